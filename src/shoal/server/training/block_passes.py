"""Forward and backward passes without a cache, in pieces, so that steps of sessions can run in between.

A piece of a forward or backward pass is a block; a piece of the norms of weights is a layer.
"""

# B sequences, T tokens, D hidden size, N factors

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from shoal.model.body import Body
from shoal.model.peft.block_adapters import weight_row_norms
from shoal.server.training.gradient_sums import GradientSum
from shoal.server.training.pass_blocks import PassBlocks
from shoal.server.training.saved_activations import BlockActivations, SavedActivations, counting_saved_bytes

T = TypeVar("T")
Pieces = Generator[None, None, T]
"""Work in pieces: its caller may do something else at every `yield`."""


@dataclass(frozen=True)
class Gradients:
    """What a backward pass finds: the gradient [B, T, D] of its inputs, if wanted, and that [N] of the factors.

    `unused` are the indices of the factor tensors that took no part in the forward pass. If the gradients of factors
    `are_summed`, they are not here but in a sum.
    """

    inputs_BTD: torch.Tensor | None
    factors_N: torch.Tensor | None
    unused: tuple[int, ...] = ()
    are_summed: bool = False


def forward(blocks: PassBlocks) -> Pieces[torch.Tensor]:
    """The outputs [B, T, D] of a span."""
    hidden_BTD = blocks.inputs_BTD
    for block in blocks.span:
        with torch.inference_mode():
            hidden_BTD = blocks(block, hidden_BTD)
        yield
    return hidden_BTD


def forward_saving(
    blocks: PassBlocks, saved: SavedActivations, weight_pointers: frozenset[int]
) -> Pieces[torch.Tensor]:
    """The outputs [B, T, D] of a span. The activations are added to `saved`, as far as its budget allows.

    `weight_pointers` are the addresses of the body's weights, which do not count.
    """
    hidden_BTD = blocks.inputs_BTD
    for block in blocks.span:
        activations = activations_of(blocks, block, hidden_BTD, weight_pointers)
        assert activations.outputs_BTD is not None
        hidden_BTD = activations.outputs_BTD.detach()
        saved.add(activations)
        yield
    return hidden_BTD


def activations_of(
    blocks: PassBlocks, block: int, hidden_BTD: torch.Tensor, weight_pointers: frozenset[int]
) -> BlockActivations:
    """Compute a block and return its outputs with their autograd graph."""
    inputs_BTD = hidden_BTD.detach().requires_grad_(True)
    with torch.enable_grad(), counting_saved_bytes(weight_pointers) as num_bytes:
        outputs_BTD = blocks(block, inputs_BTD)
    return BlockActivations(inputs_BTD, outputs_BTD, num_bytes())


def backward(
    blocks: PassBlocks,
    grad_BTD: torch.Tensor,
    saved: SavedActivations,
    weight_pointers: frozenset[int],
    *,
    inputs: bool,
    trained: frozenset[int],
) -> Pieces[Gradients]:
    """The gradients of the factors in the blocks `trained` and, if `inputs`, of the span's inputs.

    `grad_BTD` is the gradient of the span's outputs. Activations that are not in `saved` are computed again.
    """
    if not saved.of_blocks:
        yield from forward_saving(blocks, saved, weight_pointers)
    gradient = grad_BTD.to(blocks.inputs_BTD)
    first = blocks.span.start if inputs else min(trained, default=blocks.span.end)
    factors: list[tuple[nn.Parameter, torch.Tensor | None]] = []
    for block in reversed(range(first, blocks.span.end)):
        activations = saved.pop()
        if activations.outputs_BTD is None:
            activations = activations_of(blocks, block, activations.inputs_BTD, weight_pointers)
        own = blocks.adapters[block].parameters if block in trained else []
        gradient, found = _gradients(activations, own, gradient, inputs=inputs or block > first)
        factors = found + factors
        yield
    saved.drop()
    # The factors of an expert that no token was sent to have no gradient, which is not the same as a gradient of 0.
    unused = tuple(index for index, (_, found) in enumerate(factors) if found is None)
    values = [torch.zeros_like(own) if found is None else found for own, found in factors]
    factors_N = torch.cat([each.flatten() for each in values]) if values else None
    return Gradients(gradient if inputs else None, factors_N, unused)


def summing(pieces: Pieces[Gradients], into: GradientSum) -> Pieces[Gradients]:
    """The same gradients, but those of the factors are added to a sum if that has room for them."""
    found = yield from pieces
    if found.factors_N is not None and into.add(found.factors_N, found.unused):
        return Gradients(found.inputs_BTD, None, are_summed=True)
    return found


def norms(body: Body, block: int, modules: Sequence[str]) -> Pieces[torch.Tensor]:
    """The norms [N] of the rows of the weights of some linear layers of a block.

    Raises `ValueError` for a module that is no linear layer.
    """
    found: list[torch.Tensor] = []
    for module in modules:
        found.append(weight_row_norms(body.block(block), [module]))
        yield
    return torch.cat(found)


def _gradients(
    activations: BlockActivations, parameters: Sequence[nn.Parameter], gradient: torch.Tensor, *, inputs: bool
) -> tuple[torch.Tensor, list[tuple[nn.Parameter, torch.Tensor | None]]]:
    """The gradient of a block's inputs, if wanted, and those of its parameters."""
    assert activations.outputs_BTD is not None
    wanted = [activations.inputs_BTD, *parameters] if inputs else list(parameters)
    found = torch.autograd.grad(activations.outputs_BTD, wanted, gradient, allow_unused=bool(parameters))
    return found[0] if inputs else gradient, list(zip(parameters, found[inputs:], strict=True))
