"""What those who train ask for, in pieces: whoever decodes meanwhile gets in between.

Single passes, forward and backward, come a block at a time, and norms of weights a layer at a time.
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
from shoal.server.training.pass_blocks import PassBlocks
from shoal.server.training.saved_activations import BlockActivations, SavedActivations, counting_saved_bytes

T = TypeVar("T")
Pieces = Generator[None, None, T]
"""Work in pieces: whoever drives it may do something else at every `yield`."""


@dataclass(frozen=True)
class Gradients:
    """What a backward pass finds: the gradient [B, T, D] of its inputs, if wanted, and that [N] of the factors.

    `unused` are the numbers of the factors' tensors with which nothing was computed.
    """

    inputs_BTD: torch.Tensor | None
    factors_N: torch.Tensor | None
    unused: tuple[int, ...] = ()


def forward(blocks: PassBlocks) -> Pieces[torch.Tensor]:
    """The outputs [B, T, D] of a span."""
    hidden_BTD = blocks.inputs_BTD
    for block in blocks.span:
        with torch.inference_mode():
            hidden_BTD = blocks(block, hidden_BTD)
        yield
    return hidden_BTD


def forward_to_keep(blocks: PassBlocks, kept: SavedActivations, weights: frozenset[int]) -> Pieces[torch.Tensor]:
    """The same, and whatever there is room for is kept for a backward pass."""
    hidden_BTD = blocks.inputs_BTD
    for block in blocks.span:
        graph = graph_of(blocks, block, hidden_BTD, weights)
        assert graph.left_BTD is not None
        hidden_BTD = graph.left_BTD.detach()
        kept.add(graph)
        yield
    return hidden_BTD


def graph_of(blocks: PassBlocks, block: int, hidden_BTD: torch.Tensor, weights: frozenset[int]) -> BlockActivations:
    """A block's outputs with all that its gradient needs."""
    entered_BTD = hidden_BTD.detach().requires_grad_(True)
    with torch.enable_grad(), counting_saved_bytes(weights) as num_bytes:
        left_BTD = blocks(block, entered_BTD)
    return BlockActivations(entered_BTD, left_BTD, num_bytes())


def backward(
    blocks: PassBlocks,
    grad_BTD: torch.Tensor,
    kept: SavedActivations,
    weights: frozenset[int],
    *,
    inputs: bool,
    learning: frozenset[int],
) -> Pieces[Gradients]:
    """The gradients of the factors of `learning` blocks and, if wanted, of the span's inputs.

    What is not kept is computed again.
    """
    if not kept.graphs:
        yield from forward_to_keep(blocks, kept, weights)
    gradient = grad_BTD.to(blocks.inputs_BTD)
    first = blocks.span.start if inputs else min(learning, default=blocks.span.end)
    factors: list[tuple[nn.Parameter, torch.Tensor | None]] = []
    for block in reversed(range(first, blocks.span.end)):
        graph = kept.pop()
        if graph.left_BTD is None:
            graph = graph_of(blocks, block, graph.entered_BTD, weights)
        own = blocks.adapters[block].parameters if block in learning else []
        gradient, found = _gradients(graph, own, gradient, inputs=inputs or block > first)
        factors = found + factors
        yield
    kept.drop()
    # An expert that no token was sent to has used none of its factors: they have no gradient, which is not zero.
    unused = tuple(index for index, (_, found) in enumerate(factors) if found is None)
    values = [torch.zeros_like(own) if found is None else found for own, found in factors]
    factors_N = torch.cat([each.flatten() for each in values]) if values else None
    return Gradients(gradient if inputs else None, factors_N, unused)


def norms(body: Body, block: int, modules: Sequence[str]) -> Pieces[torch.Tensor]:
    """The norms [N] of the rows of some linear layers' weights, a layer at a time. Raises `ValueError`."""
    found: list[torch.Tensor] = []
    for module in modules:
        found.append(weight_row_norms(body.block(block), [module]))
        yield
    return torch.cat(found)


def _gradients(
    graph: BlockActivations, parameters: Sequence[nn.Parameter], gradient: torch.Tensor, *, inputs: bool
) -> tuple[torch.Tensor, list[tuple[nn.Parameter, torch.Tensor | None]]]:
    """The gradient of what entered a block, if wanted, and those of its parameters."""
    assert graph.left_BTD is not None
    wanted = [graph.entered_BTD, *parameters] if inputs else list(parameters)
    found = torch.autograd.grad(graph.left_BTD, wanted, gradient, allow_unused=bool(parameters))
    return found[0] if inputs else gradient, list(zip(parameters, found[inputs:], strict=True))
