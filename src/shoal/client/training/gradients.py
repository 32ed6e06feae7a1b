"""The gradients of a backward pass: what fits into one answer, which block each belongs to, and how they are summed."""

# B sequences, T tokens, D hidden size, N factors

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.client.swarm.message_sizes import is_one_message
from shoal.errors import UserError
from shoal.model.peft.factors import ActiveAdapters, AdapterFactors, FactorGradients
from shoal.protocol import MAX_PAYLOAD_BYTES
from shoal.spans import Span


@dataclass(frozen=True)
class Gradients:
    """The gradient [B, T, D] of the inputs, if it is wanted, and those of the factors, by block."""

    inputs_BTD: torch.Tensor | None
    factors: Mapping[int, FactorGradients]


@dataclass(frozen=True)
class PieceGradients:
    """The gradients of a microbatch's piece: of its inputs [B, T, D], if they are needed, and of its factors, by block.

    `summed_in` is the name of the sum on the server that has those of the factors, if they are there and not here.
    """

    inputs_BTD: torch.Tensor | None
    factors: Mapping[int, FactorGradients]
    summed_in: str | None = None


class FactorSums:
    """Gradients of factors, summed over the microbatches in the order of the batch, and then over the sums of servers.

    Sums are float64, so the order hardly ever decides how they are rounded. The gradients of one microbatch may take
    hundreds of megabytes. So only those that come before their turn are kept until then; the others are in the sums
    only.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, FactorGradients] = {}
        self._early: dict[int, Mapping[int, FactorGradients]] = {}
        self._next = 0

    def add(self, number: int, found: Mapping[int, FactorGradients]) -> None:
        """Add the gradients that the microbatch of this number `found`. Each microbatch is added once."""
        self._early[number] = found
        while (in_turn := self._early.pop(self._next, None)) is not None:
            self._next += 1
            self.join(in_turn)

    def join(self, found: Mapping[int, FactorGradients]) -> None:
        """Add gradients that are no microbatch's own, after all of those."""
        for block, each in found.items():
            self.blocks[block] = self.blocks[block] + each if block in self.blocks else each

    def rounded(self) -> dict[int, FactorGradients]:
        """The sums in float32. Gradients that nothing was added to are what they were."""
        return {block: each.rounded() for block, each in self.blocks.items()}


def spans_of_one_answer(span: Span, tuning: ActiveAdapters, *, hidden_bytes: int) -> list[Span]:
    """A span in as few parts as possible: the gradients of each part's factors and inputs fit into one answer.

    `hidden_bytes` is the size of the inputs. Raises `UserError` if the gradients of a single block do not fit.
    """
    parts, start = list[Span](), span.start
    for block in span:
        if not _is_one_answer(tuning.in_span(Span(start, block + 1)), hidden_bytes):
            if not _is_one_answer(tuning.in_span(Span(block, block + 1)), hidden_bytes):
                raise UserError(
                    f"the gradients of block {block}'s factors and of its inputs do not fit into a message of "
                    f"{MAX_PAYLOAD_BYTES >> 20} MiB",
                    hint="train factors of a smaller rank, or use shorter sequences or a dtype of fewer bytes",
                )
            parts.append(Span(start, block))
            start = block
    return [*parts, Span(start, span.end)]


def _is_one_answer(factors: Sequence[AdapterFactors], hidden_bytes: int) -> bool:
    """Whether the gradients of these factors, in one tensor, and of hidden states fit into one message."""
    if not factors:
        return True
    dtype = functools.reduce(torch.promote_types, (each.values.dtype for each in factors))
    num_factors = sum(len(each.values) for each in factors)
    return is_one_message(num_factors * dtype.itemsize + hidden_bytes, 2, longest=num_factors)


def fits_a_sum(factors: Sequence[AdapterFactors]) -> bool:
    """Whether the gradients of these factors, in float32, fit into one message."""
    num_factors = sum(len(each.values) for each in factors)
    return bool(factors) and is_one_message(num_factors * torch.float32.itemsize, 1, longest=num_factors)


def by_block(
    factors: Sequence[AdapterFactors], found_N: torch.Tensor | None, unused: Sequence[int]
) -> dict[int, FactorGradients] | None:
    """A server's gradients [N] of the factors of a span, by block; `None` if they are not of these factors.

    `unused` are the numbers, over all blocks, of the factors' tensors that have no gradient.
    """
    sizes = [len(each.values) for each in factors]
    if not factors and found_N is None:
        return {}
    if found_N is None or found_N.shape != (sum(sizes),) or not found_N.is_floating_point():
        return None
    gradients, start = {}, 0
    for each, part in zip(factors, found_N.split(sizes), strict=True):
        own = range(start, start + each.num_tensors)
        gradients[each.block] = FactorGradients(part, frozenset(index - start for index in unused if index in own))
        start = own.stop
    return gradients
