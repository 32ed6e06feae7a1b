"""What a forward pass is to compute, and in which pieces; what the backward pass after it will ask for."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.client.swarm.answers import named_tensors
from shoal.client.training.gradients import answerable
from shoal.model.peft.factors import Tuning
from shoal.policy.routing.route import Hop
from shoal.spans import Span
from shoal.tensors import TensorName


@dataclass(frozen=True)
class MicrobatchPiece:
    """A microbatch at one server: its inputs [B, T, D] there; what follows from them is kept there, by a name."""

    span: Span
    hidden: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None
    seed: int | None = None
    hop: Hop | None = None
    kept: str | None = None

    def tensors(self) -> dict[TensorName, torch.Tensor]:
        return named_tensors(self.hidden, self.positions, self.mask)


@dataclass(frozen=True)
class PassPlan:
    """What is to be computed: blocks with adapters, and what gradients will be asked for.

    `wanted_from` is the first block whose factors or inputs need one; without it, none will be asked for. The factors
    of `frozen` blocks need none.
    """

    span: Span
    tuning: Tuning
    inputs_wanted: bool = False
    wanted_from: int | None = None
    frozen: frozenset[int] = frozenset()
    seed: int | None = None

    def wants(self, span: Span) -> bool:
        """Whether anything of these blocks, or before them, needs a gradient."""
        return self.wanted_from is not None and self.wanted_from < span.end

    @functools.cached_property
    def learning(self) -> Tuning:
        """The adapters whose factors need gradients."""
        return Tuning({block: each for block, each in self.tuning.blocks.items() if block not in self.frozen})

    def wanted(self, pieces: Sequence[MicrobatchPiece]) -> list[MicrobatchPiece]:
        """Those that have to be visited on the way back."""
        return [piece for piece in pieces if self.wants(piece.span)]

    def parts(self, hop: Hop, hidden_BTD: torch.Tensor) -> list[Hop]:
        """A hop, or several on its server if the gradients that will be asked for are too large for one answer."""
        if not self.wants(hop.span):
            return [hop]
        spans = answerable(hop.span, self.learning, hidden_bytes=hidden_BTD.nbytes)
        return [Hop(hop.server, span) for span in spans]

    def microbatches(
        self, hidden_BTD: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None, *, rows: int
    ) -> list[MicrobatchPiece]:
        """A batch in pieces of so many sequences, each of which drops others at random."""
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


def _rows(tensor: torch.Tensor | None, start: int, count: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[start : start + count]
