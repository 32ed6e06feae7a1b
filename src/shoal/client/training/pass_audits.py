"""Audits of single passes: now and then, a server's part of a microbatch is computed by other servers too.

The server and a witness are asked at once. If they differ, a second witness settles it, and what two of the three have
computed is the result: a pass that was audited is right. Which of the passes before it were wrong cannot be told any
more, because their results are in the user's model: an event says how many they are. A witness that fails, or is late,
costs no pass: the audit is given up.

Gradients of factors that a server adds up are audited when the sum is here: witnesses compute all of its passes. So no
server knows of any pass whether it counts in an audit, before it has answered.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TypeVar

import torch

from shoal.client.swarm.comparing.findings import Findings, Testimony, allowed_between, compare
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.audited_work import BackwardWork, ForwardWork, SumWork, Work
from shoal.client.training.gradients import PieceGradients
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan, pass_needs
from shoal.client.training.server_passes import ServerPasses
from shoal.client.training.sum_ledger import SummedPass
from shoal.concurrency import now, owned_task
from shoal.errors import MissingBlocks, PeerError, ServerLost, SwarmError, UnsupportedOperation
from shoal.events import PassesDoubtful, ServerAudited
from shoal.model.peft.factors import FactorGradients
from shoal.policy.audits.likeness import MIN_TOKENS, Allowed, Form, typical
from shoal.policy.audits.verdict import Verdict
from shoal.policy.routing.route import Hop, Route

log = logging.getLogger(__name__)
T = TypeVar("T")

LATE_SECONDS = 5.0
LATE_FACTOR = 5.0
"""A witness is late after `LATE_SECONDS`, and after `LATE_FACTOR` times as long as its route is expected to take."""


class PassAudits:
    """Waits for what `ServerPasses` asks servers for, and audits some of it if the user wants audits."""

    def __init__(self, swarm: Swarm, servers: ServerPasses) -> None:
        self._swarm = swarm
        self._servers = servers
        self._book = swarm.audits
        # The passes of each server since its last clean audit, forward and backward: it may lie in one of both only.
        self._num_doubtful: dict[type, Counter[str]] = {
            ForwardWork: Counter(),
            BackwardWork: Counter(),
            SumWork: Counter(),
        }

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
        return await self._watched(piece.hop, ForwardWork(self._servers, plan, piece), lambda: outputs(piece))

    async def backward(
        self,
        plan: PassPlan,
        piece: MicrobatchPiece,
        grad_BTD: torch.Tensor,
        gradients: Callable[[torch.Tensor], Awaitable[PieceGradients | None]],
        *,
        may_sum: bool,
    ) -> PieceGradients | None:
        """The `gradients` of a piece on the server of its hop. Raises `PeerError`s.

        If the server `may_sum` those of factors, they are compared as a sum, whether it has or not.
        """
        if not self._book.is_on:
            return await gradients(grad_BTD)
        assert piece.hop is not None
        work = BackwardWork(self._servers, plan, piece, grad_BTD, compares_factors=not may_sum)
        found = await self._watched(piece.hop, work, lambda: gradients(grad_BTD))
        if found is None or found.summed_in is not None or not may_sum or self.has_lied(piece.peer):
            return found
        one = SummedPass(0, piece, grad_BTD)  # it has no room for a sum, as it says
        return replace(found, factors=await self.sum(plan, piece.hop, [one], found.factors))

    async def sum(
        self, plan: PassPlan, hop: Hop, passes: Sequence[SummedPass], found: Mapping[int, FactorGradients]
    ) -> Mapping[int, FactorGradients]:
        """The gradients of factors, by block, that the server of a hop has `found` in these passes together.

        Raises `PeerError`s.
        """
        if not self._book.is_on:
            return found

        async def given() -> Mapping[int, FactorGradients]:
            return found

        summed = await self._watched(hop, SumWork(self._servers, plan, passes), given)
        assert summed is not None  # it is given
        return summed

    def has_lied(self, peer: str) -> bool:
        """Whether a server was found lying: what it pushed is of no use, even if its answer was put right."""
        return self._book.is_on and self._book.is_liar(peer)

    async def _watched(self, hop: Hop, work: Work[T], ask: Callable[[], Awaitable[T | None]]) -> T | None:
        """What a server answers; what witnesses compute if that is something else. Raises `PeerError`s."""
        peer = hop.server.peer
        self._tell_of_liars()
        self._refuse_liar(peer)
        if work.purse == "outputs":  # the passes of a sum are recorded already
            self._book.record_pass(peer)
        if self._is_chosen(hop, work):
            async with self._book.audit_one:
                answer = await self._audited(hop, work, ask)
        else:
            answer = await ask()
            self._refuse_liar(peer)  # it was found meanwhile
            self._num_doubtful[type(work)][peer] += 0 if answer is None else len(work.pieces)
        self._tell_of_liars()
        if answer is not None:
            self._book.earn(work.cost / len(hop.span), len(hop.span), by=work.purse)
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

    def _is_chosen(self, hop: Hop, work: Work[T]) -> bool:
        num_tokens = work.num_compared
        if num_tokens < MIN_TOKENS:
            return False
        candidate = self._book.candidate(hop.server.peer, num_tokens=num_tokens, cost=work.cost)
        return self._book.audits_pass(candidate, by=work.purse) and work.is_comparable()

    async def _audited(self, hop: Hop, work: Work[T], ask: Callable[[], Awaitable[T | None]]) -> T | None:
        peer, num_before = hop.server.peer, self._num_doubtful[type(work)][hop.server.peer]
        async with owned_task(self._testimony(work, {peer})) as witnessing:
            answer = await ask()
            first = None if answer is None else await witnessing
        if answer is None:
            return None
        if first is None or not work.is_usable(answer) or not work.is_usable(first.answer):
            self._book.postpone(peer)
            self._num_doubtful[type(work)][peer] += len(work.pieces)
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

    async def _testimony(self, work: Work[T], not_by: Set[str]) -> Testimony[T] | None:
        """What servers other than these compute; `None` if they cannot, or are late."""
        began = now()
        try:
            async with asyncio.timeout(LATE_SECONDS) as limit:
                route = await self._route_of_others(work.pieces[0], not_by)
                limit.reschedule(now() + max(LATE_SECONDS, LATE_FACTOR * route.seconds) * len(work.pieces))
                self._book.spend(work.cost, by=work.purse)
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
        if others.missing(span):
            raise MissingBlocks(f"no other server holds blocks {span}", blocks=tuple(span))
        return await self._swarm.route_of_others(span, peers, needs=pass_needs(piece.hidden))

    def _conclude(self, hop: Hop, work: Work[T], findings: Findings, num_before: int) -> None:
        """Draw the consequences of an audit, which began after `num_before` doubtful passes."""
        peer, num_tokens, model = hop.server.peer, work.num_compared, self._swarm.model.name
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
                self._num_doubtful[type(work)][peer] += len(work.pieces)
                names = " and ".join((peer, *findings.witnesses))
                self._tell(peer, f"{names} differ, and no other server decides")
