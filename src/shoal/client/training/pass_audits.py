"""Audits of single passes: now and then, a server's part of a microbatch is computed by other servers too.

The server and a witness are asked at once. If they differ, a second witness settles it, and what two of the three have
computed is the result: a pass that was audited is right. Which of the passes before it were wrong cannot be told any
more, because their results are in the user's model: an event says how many they are. A witness that fails, or is late,
costs no pass: the audit is given up.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

import torch

from shoal.client.swarm.answers import finite
from shoal.client.swarm.comparing.distances import distances, relative_distance
from shoal.client.swarm.comparing.findings import Findings, Testimony, allowed_between, compare
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan, pass_needs
from shoal.client.training.server_passes import PieceGradients, ServerPasses
from shoal.concurrency import now, owned_task
from shoal.errors import MissingBlocks, PeerError, ServerLost, SwarmError, UnsupportedOperation
from shoal.events import PassesDoubtful, ServerAudited
from shoal.model.peft.factors import FactorGradients
from shoal.policy.audits.audit_budget import audit_cost
from shoal.policy.audits.likeness import FIRST_POSITION, MIN_TOKENS, Allowed, Form, for_gradients, typical
from shoal.policy.audits.verdict import Verdict
from shoal.policy.routing.route import Hop, Route
from shoal.spans import Span

log = logging.getLogger(__name__)
T = TypeVar("T")

LATE_SECONDS = 5.0
LATE_FACTOR = 5.0
"""A witness is late after `LATE_SECONDS`, and after `LATE_FACTOR` times as long as its route is expected to take."""


class _Work(Protocol[T]):
    """What is computed in an audited pass, by the server and by witnesses."""

    @property
    def piece(self) -> MicrobatchPiece:
        """The piece that is computed."""
        ...

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


class PassAudits:
    """Waits for what `ServerPasses` asks servers for, and audits some of it if the user wants audits."""

    def __init__(self, swarm: Swarm, servers: ServerPasses) -> None:
        self._swarm = swarm
        self._servers = servers
        self._book = swarm.audits
        # The passes of each server since its last clean audit, forward and backward: it may lie in one of both only.
        self._num_doubtful: dict[type, Counter[str]] = {_Forward: Counter(), _Backward: Counter()}

    async def forward(
        self,
        plan: PassPlan,
        piece: MicrobatchPiece,
        outputs: Callable[[MicrobatchPiece], Awaitable[torch.Tensor | None]],
    ) -> torch.Tensor | None:
        """The `outputs` [B, T, D] of a piece on the server of its hop. Raises `PeerError`s."""
        if not self._book.is_on:
            return await outputs(piece)
        assert piece.hop is not None
        return await self._watched(piece.hop, _Forward(self._servers, plan, piece), lambda: outputs(piece))

    async def backward(
        self,
        plan: PassPlan,
        piece: MicrobatchPiece,
        grad_BTD: torch.Tensor,
        gradients: Callable[[torch.Tensor], Awaitable[PieceGradients | None]],
    ) -> PieceGradients | None:
        """The `gradients` of a piece on the server of its hop. Raises `PeerError`s."""
        if not self._book.is_on:
            return await gradients(grad_BTD)
        assert piece.hop is not None
        work = _Backward(self._servers, plan, piece, grad_BTD)
        return await self._watched(piece.hop, work, lambda: gradients(grad_BTD))

    def has_lied(self, peer: str) -> bool:
        """Whether a server was found lying: what it pushed is of no use, even if its answer was put right."""
        return self._book.is_on and self._book.is_liar(peer)

    async def _watched(self, hop: Hop, work: _Work[T], ask: Callable[[], Awaitable[T | None]]) -> T | None:
        """What a server answers; what witnesses compute if that is something else. Raises `PeerError`s."""
        peer = hop.server.peer
        self._tell_of_liars()
        self._refuse_liar(peer)
        self._book.record_pass(peer)
        if self._is_chosen(hop, work):
            async with self._book.audit_one:
                answer = await self._audited(hop, work, ask)
        else:
            answer = await ask()
            self._refuse_liar(peer)  # it was found meanwhile
            self._num_doubtful[type(work)][peer] += answer is not None
        self._tell_of_liars()
        if answer is not None:
            self._book.earn(_cost(hop.span, work.piece) / len(hop.span), len(hop.span))
        return answer

    def _refuse_liar(self, peer: str) -> None:
        if self._book.is_liar(peer):
            raise ServerLost(f"{peer} was found lying", peer=peer)

    def _tell_of_liars(self) -> None:
        """Say what servers that are found lying by now, in a pass or in a session, may have spoiled."""
        used = {peer for each in self._num_doubtful.values() for peer in each}
        for peer in self._book.liars & used:
            self._tell(peer, f"{peer} was found lying")
            for each in self._num_doubtful.values():
                del each[peer]

    def _tell(self, peer: str, reason: str) -> None:
        if num_passes := sum(each[peer] for each in self._num_doubtful.values()):
            self._swarm.events.emit(PassesDoubtful(self._swarm.model.name, peer, num_passes, reason))

    def _is_chosen(self, hop: Hop, work: _Work[T]) -> bool:
        num_tokens = int(_compared(work.piece).sum())
        if num_tokens < MIN_TOKENS:
            return False
        candidate = self._book.candidate(hop.server.peer, num_tokens=num_tokens, cost=_cost(hop.span, work.piece))
        return self._book.audits_pass(candidate) and work.is_comparable()

    async def _audited(self, hop: Hop, work: _Work[T], ask: Callable[[], Awaitable[T | None]]) -> T | None:
        peer, num_before = hop.server.peer, self._num_doubtful[type(work)][hop.server.peer]
        async with owned_task(self._testimony(work, {peer})) as witnessing:
            answer = await ask()
            first = None if answer is None else await witnessing
        if answer is None:
            return None
        if first is None or not work.is_usable(answer) or not work.is_usable(first.answer):
            self._book.postpone(peer)
            self._num_doubtful[type(work)][peer] += 1
            return answer

        def allowed(ones: Sequence[Form], others: Sequence[Form]) -> Allowed:
            return work.allowed(allowed_between(ones, others, encoding=self._swarm.config.wire))

        claimed = Testimony.of(answer, [hop.server])
        peers = {peer, *first.peers}
        findings = await compare(
            claimed, first, lambda: self._testimony(work, peers), apart=work.apart, allowed=allowed
        )
        self._conclude(hop, work, findings, num_before)
        return first.answer if findings.verdict is Verdict.LIED else answer

    async def _testimony(self, work: _Work[T], not_by: Set[str]) -> Testimony[T] | None:
        """What servers other than these compute; `None` if they cannot, or are late."""
        began = now()
        try:
            async with asyncio.timeout(LATE_SECONDS) as limit:
                route = await self._route_of_others(work.piece, not_by)
                limit.reschedule(now() + max(LATE_SECONDS, LATE_FACTOR * route.seconds))
                self._book.spend(_cost(work.piece.span, work.piece))
                with self._swarm.measurements.reserving(route):
                    answer = await work.on(route.hops)
        except MissingBlocks as missing:
            log.debug("a pass cannot be audited: %s", missing)
        except PeerError as failure:
            log.info("an audit of a pass was given up: %s", failure)
            self._swarm.servers.blame(failure, since=began)
        except (SwarmError, UnsupportedOperation) as failure:
            log.info("an audit of a pass was given up: %s", failure)
        except TimeoutError:
            log.info("an audit of a pass was given up: its witnesses are late")
        else:
            return Testimony.of(answer, (hop.server for hop in route.hops))
        return None

    async def _route_of_others(self, piece: MicrobatchPiece, peers: Set[str]) -> Route:
        """A route over servers other than these. Raises `MissingBlocks`, without any search, if there is none."""
        span = piece.span
        others = (await self._swarm.servers.present()).only(lambda each: each.training and each.peer not in peers)
        if not others.missing(span):
            route = await self._swarm.route(span, self._swarm.servers.holdings(peers), needs=pass_needs(piece.hidden))
            if peers.isdisjoint(hop.server.peer for hop in route.hops):  # else they have announced other blocks
                return route
        raise MissingBlocks(f"no other server holds blocks {span}", blocks=tuple(span))

    def _conclude(self, hop: Hop, work: _Work[T], findings: Findings, num_before: int) -> None:
        """Draw the consequences of an audit, which began after `num_before` doubtful passes."""
        peer, num_tokens, model = hop.server.peer, int(_compared(work.piece).sum()), self._swarm.model.name
        distance, finding = typical(findings.distances), findings.verdict.name.lower()
        self._swarm.events.emit(ServerAudited(peer, hop.span, num_tokens, distance, finding, findings.witnesses))
        evidence = findings.evidence(peer, model, hop.span, position=0, num_tokens=num_tokens, found_at=time.time())
        match findings.verdict:
            case Verdict.CLEAN | Verdict.WITNESS_LIED:
                self._book.record_clean(peer)
                self._num_doubtful[type(work)][peer] -= num_before
                if findings.verdict is Verdict.WITNESS_LIED and findings.accuser is not None:
                    self._swarm.audits.shut_out(evidence.against(findings.accuser, peer))
            case Verdict.LIED:
                self._swarm.audits.shut_out(evidence)
            case Verdict.UNSETTLED:
                self._book.postpone_long(peer)
                self._num_doubtful[type(work)][peer] += 1
                names = " and ".join((peer, *findings.witnesses))
                self._tell(peer, f"{names} differ, and no other server decides")


@dataclass(frozen=True)
class _Forward:
    """The outputs [B, T, D] of a piece."""

    servers: ServerPasses
    plan: PassPlan
    piece: MicrobatchPiece

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
class _Backward:
    """The gradients of a piece, from those of its outputs."""

    servers: ServerPasses
    plan: PassPlan
    piece: MicrobatchPiece
    grad_BTD: torch.Tensor

    def is_comparable(self) -> bool:
        return finite(self.piece.hidden) and finite(self.grad_BTD) and bool(self.grad_BTD.any())

    def is_usable(self, answer: PieceGradients) -> bool:
        """Honest gradients may overflow on one server only; the user's gradient scaler looks for that."""
        inputs_BTD, factors = answer
        return all(finite(each) for each in [*_present(inputs_BTD), *(own.values for own in factors.values())])

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
                grad_BTD = found[0]
                factors.update(found[1])
        return grad_BTD, factors

    def apart(self, one: PieceGradients, other: PieceGradients) -> list[float]:
        (one_BTD, ones), (other_BTD, others) = one, other
        found = [relative_distance(*pair) for pair in zip(_present(one_BTD), _present(other_BTD), strict=True)]
        for block, own in ones.items():
            is_same = own.unused == others[block].unused
            found.append(relative_distance(own.values, others[block].values) if is_same else math.inf)
        return [max(found)]

    def allowed(self, allowed: Allowed) -> Allowed:
        return for_gradients(allowed)


def _part(piece: MicrobatchPiece, hop: Hop, hidden_BTD: torch.Tensor) -> MicrobatchPiece:
    """What a witness is sent: its part of the piece, of which it has saved nothing."""
    return replace(piece, span=hop.span, hidden=hidden_BTD, hop=hop, saved_as=None)


def _present(tensor: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if tensor is None else [tensor]


def _compared(piece: MicrobatchPiece) -> torch.Tensor:
    """The tokens [B, T] whose outputs are compared: neither padding nor the first ones of a sequence."""
    kept_BT = torch.ones(piece.hidden.shape[:2], dtype=torch.bool) if piece.mask is None else piece.mask.bool()
    return kept_BT & (kept_BT.cumsum(dim=1) > FIRST_POSITION)


def _cost(span: Span, piece: MicrobatchPiece) -> float:
    """What it costs to compute a piece, and what audits earn a part of."""
    batch_size, num_tokens, _ = piece.hidden.shape
    return audit_cost(batch_size * num_tokens, len(span), decode_speed=None, prefill_speed=None)
