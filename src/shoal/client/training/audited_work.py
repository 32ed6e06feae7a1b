"""What audits of passes compare: outputs, gradients, and sums of gradients, of servers and of witnesses."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Protocol, TypeVar

import torch

from shoal.client.swarm.answers import finite
from shoal.client.swarm.audit_book import Purse
from shoal.client.swarm.comparing.distances import distances, relative_distance
from shoal.client.training.gradients import FactorSums, PieceGradients
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.server_passes import ServerPasses
from shoal.client.training.sum_ledger import SummedPass
from shoal.model.peft.factors import FactorGradients
from shoal.policy.audits.audit_budget import audit_cost
from shoal.policy.audits.likeness import FIRST_POSITION, Allowed, for_gradients
from shoal.policy.routing.route import Hop

T = TypeVar("T")


class Work(Protocol[T]):
    """What is computed in an audited pass, or in those of an audited sum, by the server and by witnesses."""

    purse: ClassVar[Purse] = "outputs"
    """What pays for its audits."""

    @property
    def pieces(self) -> Sequence[MicrobatchPiece]:
        """The pieces that are computed, all of one span: one, or those whose gradients are summed."""
        ...

    @property
    def num_compared(self) -> int:
        """The tokens that count in an audit."""
        return sum(int(_compared(piece).sum()) for piece in self.pieces)

    @property
    def cost(self) -> float:
        """What it costs to compute it, and what audits earn a part of."""
        num_tokens = sum(piece.hidden.shape[:2].numel() for piece in self.pieces)
        return audit_cost(num_tokens, len(self.pieces[0].span), decode_speed=None, prefill_speed=None)

    def is_comparable(self) -> bool:
        """Whether the results of honest servers for these inputs can be compared."""
        ...

    def is_usable(self, answer: T) -> bool:
        """Whether an answer can be compared with others."""
        ...

    async def on(self, hops: Sequence[Hop]) -> T:
        """What the witnesses on these hops compute. Raises `PeerError`s."""
        ...

    def apart(self, one: T, other: T) -> list[float]:
        """The distances of two answers."""
        ...

    def allowed(self, allowed: Allowed) -> Allowed:
        """How large they may be if outputs may be as far apart as `allowed` says."""
        ...


@dataclass(frozen=True)
class ForwardWork(Work[torch.Tensor]):
    """The outputs [B, T, D] of a piece."""

    servers: ServerPasses
    plan: PassPlan
    piece: MicrobatchPiece

    @property
    def pieces(self) -> Sequence[MicrobatchPiece]:
        return [self.piece]

    def is_comparable(self) -> bool:
        return finite(self.piece.hidden)

    def is_usable(self, answer: torch.Tensor) -> bool:
        return True

    async def on(self, hops: Sequence[Hop]) -> torch.Tensor:
        hidden_BTD = self.piece.hidden
        for hop in hops:
            hidden_BTD = await self.servers.forward(self.plan, hop, _part(self.piece, hop, hidden_BTD))
        return hidden_BTD

    def apart(self, one: torch.Tensor, other: torch.Tensor) -> list[float]:
        return distances(one, other, self.piece.hidden, _compared(self.piece))

    def allowed(self, allowed: Allowed) -> Allowed:
        return allowed


@dataclass(frozen=True)
class BackwardWork(Work[PieceGradients]):
    """The gradients of a piece, from those of its outputs. Those of factors may be compared with the sum."""

    servers: ServerPasses
    plan: PassPlan
    piece: MicrobatchPiece
    grad_BTD: torch.Tensor
    compares_factors: bool = True

    @property
    def pieces(self) -> Sequence[MicrobatchPiece]:
        return [self.piece]

    def is_comparable(self) -> bool:
        has_any = self.compares_factors or self.plan.needs_inputs_of(self.piece.span)
        return has_any and finite(self.piece.hidden) and finite(self.grad_BTD) and bool(self.grad_BTD.any())

    def is_usable(self, answer: PieceGradients) -> bool:
        """Honest gradients may overflow on one server only; the user's gradient scaler looks for that."""
        factors = answer.factors if self.compares_factors else {}
        return all(finite(each) for each in [*_present(answer.inputs_BTD), *(own.values for own in factors.values())])

    async def on(self, hops: Sequence[Hop]) -> PieceGradients:
        parts, hidden_BTD = [_part(self.piece, hops[0], self.piece.hidden)], self.piece.hidden
        for hop, following in pairwise(hops):
            hidden_BTD = await self.servers.forward(self.plan, hop, parts[-1])
            parts.append(_part(self.piece, following, hidden_BTD))
        grad_BTD: torch.Tensor | None = self.grad_BTD
        factors: dict[int, FactorGradients] = {}
        for hop, part in zip(reversed(hops), reversed(parts), strict=True):
            if self.plan.wants(part.span):
                assert grad_BTD is not None
                found = await self.servers.backward(self.plan, hop, part, grad_BTD)
                assert found is not None  # only a piece that a server has saved may be gone
                grad_BTD = found.inputs_BTD
                factors.update(found.factors)
        return PieceGradients(grad_BTD, factors)

    def apart(self, one: PieceGradients, other: PieceGradients) -> list[float]:
        pairs = zip(_present(one.inputs_BTD), _present(other.inputs_BTD), strict=True)
        found = [relative_distance(*pair) for pair in pairs]
        return [max([*found, *(_factors_apart(one.factors, other.factors) if self.compares_factors else ())])]

    def allowed(self, allowed: Allowed) -> Allowed:
        return for_gradients(allowed)


@dataclass(frozen=True)
class SumWork(Work[Mapping[int, FactorGradients]]):
    """The gradients of factors, by block, of several passes together."""

    purse: ClassVar[Purse] = "sums"
    servers: ServerPasses
    plan: PassPlan
    passes: Sequence[SummedPass]

    @property
    def pieces(self) -> Sequence[MicrobatchPiece]:
        return [one.piece for one in self.passes]

    def is_comparable(self) -> bool:
        return all(finite(one.piece.hidden) and finite(one.grad_BTD) for one in self.passes) and any(
            bool(one.grad_BTD.any()) for one in self.passes
        )

    def is_usable(self, answer: Mapping[int, FactorGradients]) -> bool:
        return all(finite(own.values) for own in answer.values())

    async def on(self, hops: Sequence[Hop]) -> Mapping[int, FactorGradients]:
        sums = FactorSums()
        for one in self.passes:
            found = await BackwardWork(self.servers, self.plan, one.piece, one.grad_BTD).on(hops)
            sums.join(found.factors)
        return sums.blocks

    def apart(self, one: Mapping[int, FactorGradients], other: Mapping[int, FactorGradients]) -> list[float]:
        return [max(_factors_apart(one, other))]

    def allowed(self, allowed: Allowed) -> Allowed:
        return for_gradients(allowed)


def _factors_apart(ones: Mapping[int, FactorGradients], others: Mapping[int, FactorGradients]) -> list[float]:
    return [
        relative_distance(own.values, others[block].values) if own.unused == others[block].unused else math.inf
        for block, own in ones.items()
    ]


def _part(piece: MicrobatchPiece, hop: Hop, hidden_BTD: torch.Tensor) -> MicrobatchPiece:
    """What a witness is sent: its part of the piece, of which it has saved nothing."""
    return replace(piece, span=hop.span, hidden=hidden_BTD, hop=hop, saved_as=None)


def _present(tensor: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if tensor is None else [tensor]


def _compared(piece: MicrobatchPiece) -> torch.Tensor:
    """The tokens [B, T] whose outputs are compared: neither padding nor the first ones of a sequence."""
    kept_BT = torch.ones(piece.hidden.shape[:2], dtype=torch.bool) if piece.mask is None else piece.mask.bool()
    return kept_BT & (kept_BT.cumsum(dim=1) > FIRST_POSITION)
