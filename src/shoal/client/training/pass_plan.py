"""What a forward pass computes, in which pieces, and which gradients the backward pass after it needs."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.client.swarm.answers import named_tensors
from shoal.client.training.gradients import spans_of_one_answer
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.routing.route import Hop, Needs
from shoal.spans import Span
from shoal.tensors import TensorName


@dataclass(frozen=True)
class MicrobatchPiece:
    """A microbatch in the span of one server: its inputs there, `hidden` [B, T, D], and what else a server needs.

    `hop` is the server that computed it. That server has saved what a backward pass needs under the name `saved_as`, if
    there is one. `seed` decides what the adapters drop at random.
    """

    span: Span
    hidden: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None
    seed: int | None = None
    hop: Hop | None = None
    saved_as: str | None = None

    @property
    def peer(self) -> str:
        """The peer id of the server that computes it, which is known."""
        assert self.hop is not None
        return self.hop.server.peer

    def tensors(self) -> dict[TensorName, torch.Tensor]:
        """The tensors that a server is sent to compute it."""
        return named_tensors(self.hidden, self.positions, self.mask)


@dataclass(frozen=True)
class PassPlan:
    """The blocks of a pass, their adapters, and the gradients that the backward pass needs.

    `wanted_from` is the first block whose factors or inputs need a gradient; `None` if there will be no backward pass.
    The factors of `frozen` blocks need no gradient. `inputs_wanted` tells whether the inputs of the span do.
    """

    span: Span
    tuning: ActiveAdapters
    inputs_wanted: bool = False
    wanted_from: int | None = None
    frozen: frozenset[int] = frozenset()
    seed: int | None = None

    def wants(self, span: Span) -> bool:
        """Whether a backward pass visits these blocks: they, or blocks before them, need a gradient."""
        return self.wanted_from is not None and self.wanted_from < span.end

    def needs_inputs_of(self, span: Span) -> bool:
        """Whether a backward pass needs the gradient of the inputs of these blocks."""
        return self.inputs_wanted or (self.wanted_from is not None and self.wanted_from < span.start)

    @functools.cached_property
    def trained(self) -> ActiveAdapters:
        """The adapters whose factors need gradients."""
        return ActiveAdapters({block: each for block, each in self.tuning.blocks.items() if block not in self.frozen})

    def wanted(self, pieces: Sequence[MicrobatchPiece]) -> list[MicrobatchPiece]:
        """The pieces that a backward pass visits."""
        return [piece for piece in pieces if self.wants(piece.span)]

    def parts(self, hop: Hop, hidden_BTD: torch.Tensor) -> list[Hop]:
        """A hop, in several parts on its server if the gradients that will be needed do not fit into one answer."""
        if not self.wants(hop.span):
            return [hop]
        spans = spans_of_one_answer(hop.span, self.trained, hidden_bytes=hidden_BTD.nbytes)
        return [Hop(hop.server, span) for span in spans]

    def microbatches(
        self, hidden_BTD: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None, *, rows: int
    ) -> list[MicrobatchPiece]:
        """A batch in microbatches of `rows` sequences, each with its own seed."""
        return [
            MicrobatchPiece(
                self.span,
                part,
                _rows(positions, start, rows),
                _rows(mask, start, rows),
                None if self.seed is None else self.seed + (start << 16),
            )
            for start, part in zip(range(0, len(hidden_BTD), rows), hidden_BTD.split(rows), strict=True)
        ]


def pass_needs(hidden_BTD: torch.Tensor) -> Needs:
    """What a route is needed for: one pass, for which servers keep no cache."""
    batch_size, num_tokens, _ = hidden_BTD.shape
    return Needs(step_tokens=batch_size * num_tokens, session=False, dtype=str(hidden_BTD.dtype).removeprefix("torch."))


def _rows(tensor: torch.Tensor | None, start: int, count: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[start : start + count]
