"""The audits of one session: what its servers answered is computed again by others, now and then and unforeseen.

Servers cannot tell an audit from a session. The first audit of a server that is new to this client comes soon, later
ones as the budget allows (`shoal.policy.audits`). A server that differs from a witness is blamed only if a second
witness agrees with the first.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import torch

from shoal.client.decoding.auditing.claim import Claim
from shoal.client.decoding.auditing.examination import examine
from shoal.client.decoding.auditing.logits_tail import LogitsTail
from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.receipts.doubt import Doubt
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.head.logits import Logits, LogitsRequest
from shoal.client.history.history import History
from shoal.client.swarm.comparing.findings import Findings
from shoal.client.swarm.swarm import Swarm
from shoal.concurrency import first_of, owned_task
from shoal.errors import MissingBlocks, SwarmError
from shoal.events import ServerAudited
from shoal.policy.audits.audit_budget import audit_cost
from shoal.policy.audits.likeness import MIN_TOKENS, typical
from shoal.policy.audits.verdict import Verdict
from shoal.policy.batching.scheduling import DECODE_TOKENS

log = logging.getLogger(__name__)


class SessionAuditor:
    """Audits the servers of a session. The session tells it of its steps, and of every change of its past."""

    def __init__(self, swarm: Swarm, inputs: SessionInputs, planner: RoutePlanner) -> None:
        self._swarm = swarm
        self._book = swarm.audits
        self._inputs = inputs
        self._planner = planner
        self._claims: dict[Stage, Claim] = {}
        self._outputs: History | LogitsTail | None = History(swarm.store) if self._book.is_on else None
        self._num_stable = 0  # tokens whose outputs the caller has gone on with
        self._wakeup = asyncio.Event()
        self._mending = asyncio.Event()
        self._doubts: list[Doubt] = []  # from which the session has not recovered
        self._running: tuple[int, asyncio.Event] | None = None  # how far an audit goes, and whether it is void

    def num_audited(self, stages: Sequence[Stage]) -> int:
        """How many of the first tokens have passed audits on all of these stages, and on those that they replaced."""
        if not all(stage in self._claims for stage in stages):
            return 0
        return min((claim.clean for claim in self._claims.values()), default=0)

    # -- what the session tells ---------------------------------------------------------------------------------------

    def answered(self, pipeline: Pipeline, position: int, end: int, outputs: torch.Tensor | Logits) -> None:
        """A step from `position` to `end` was answered."""
        if not self._book.is_on:
            return
        self._keep(pipeline.logits_request, position, end, outputs)
        num_tokens = end - position
        num_decoded = num_tokens if num_tokens <= DECODE_TOKENS else 0
        self._book.earn(self._planner.batch_size * num_decoded, sum(len(each.hop.span) for each in pipeline.stages))
        self._book.record_use([each.peer for each in pipeline.stages], num_decoded=num_decoded)
        self._num_stable = position
        self._update_claims(pipeline)
        self._doubts += pipeline.receipts.take_doubts()
        self._mending.set()
        self._wakeup.set()

    def _keep(self, request: LogitsRequest | None, position: int, end: int, outputs: torch.Tensor | Logits) -> None:
        """Keep what the last server gave: all hidden states, or the last logits."""
        if isinstance(outputs, Logits):
            assert request is not None
            if not isinstance(self._outputs, LogitsTail):
                self._outputs = LogitsTail(row=self._book.any_of(outputs.values.shape[0]))
            self._outputs.append(outputs, request, end)
        elif isinstance(self._outputs, History) and self._outputs.num_tokens == position:
            self._outputs.append(outputs)
            self._outputs.settle(self._outputs.num_tokens)
        else:  # hidden states are missing, those of tokens for which there were logits
            self._outputs = None

    def cropped(self, num_tokens: int) -> None:
        """The session has forgotten all tokens after the first `num_tokens`."""
        if self._outputs is not None and self._outputs.num_tokens > num_tokens:
            self._outputs.crop(num_tokens)
        self._num_stable = min(self._num_stable, num_tokens)
        for claim in self._claims.values():
            claim.cropped(num_tokens)
        if self._running is not None and num_tokens < self._running[0]:
            self._running[1].set()

    def rearranged(self, rows: Sequence[int], stages: Sequence[Stage]) -> None:
        """Sequence i continues the one that was `rows[i]`, on these stages."""
        if isinstance(self._outputs, LogitsTail):
            self._outputs.crop(0)
        elif self._outputs is not None:
            self._outputs.select_rows(rows)
        self._claims = {stage: claim for stage, claim in self._claims.items() if stage in stages}
        if self._running is not None:
            self._running[1].set()

    def distrusted(self, doubt: Doubt) -> None:
        """The session has forgotten all outputs of the blocks from those of the doubt on, from its position on."""
        if self._outputs is not None and self._outputs.num_tokens > doubt.position:
            self._outputs.crop(doubt.position)
        for stage, claim in list(self._claims.items()):
            if claim.span.end > doubt.span.start:
                claim.cropped(doubt.position)
            if claim.peer == doubt.liar:
                del self._claims[stage]
        if self._running is not None:
            self._running[1].set()

    def recomputed(self, outputs: torch.Tensor | Logits) -> None:
        """What was forgotten of the last server's outputs was computed again."""
        if isinstance(self._outputs, History) and isinstance(outputs, torch.Tensor):
            self._outputs.append(outputs)

    def _update_claims(self, pipeline: Pipeline) -> None:
        """Bring what each server has answered up to date."""
        for index, stage in enumerate(pipeline.stages):
            is_last = index + 1 == len(pipeline.stages)
            outputs = self._outputs if is_last else pipeline.stages[index + 1].history
            if outputs is None or stage.answered_from is None:
                continue
            claim = self._claims.get(stage)
            if claim is None or claim.inputs is not stage.history or claim.outputs is not outputs:
                claim = self._claims[stage] = Claim(
                    stage.hop.server, stage.hop.span, stage.history, outputs, stage.answered_from, stage.answered_from
                )
            # What a server was pushed, it may have answered before the client knows it.
            known = min(stage.num_tokens, outputs.num_tokens, stage.progress.num_computed)
            claim.end = max(claim.end, min(known, self._num_stable))
            pusher = pipeline.pusher_to(stage)
            if pusher is not None and pusher not in claim.pushed_by:
                claim.pushed_by = (*claim.pushed_by, pusher)

    # -- auditing -----------------------------------------------------------------------------------------------------

    async def run(self, recover: Callable[[Doubt], Awaitable[None]]) -> None:
        """Audit until this is cancelled. `recover` lets the session compute again what is not to be trusted."""
        await first_of(self._audit_in_turn(), self._mend(recover))

    async def _mend(self, recover: Callable[[Doubt], Awaitable[None]]) -> None:
        """Recover from what was found: by an audit, by receipts, or by another session."""
        while True:
            await self._mending.wait()
            self._mending.clear()
            while self._doubts:
                if self._doubts[0].position < self._inputs.num_tokens:  # not taken back meanwhile
                    await recover(self._doubts[0])
                self._doubts.pop(0)
                self._wakeup.set()
            for stage, claim in list(self._claims.items()):
                if self._book.is_liar(claim.peer) and self._claims.pop(stage, None) is not None:
                    await recover(Doubt(claim.span, claim.clean, f"{claim.peer} was found lying", liar=claim.peer))

    async def _audit_in_turn(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            if self._doubts:  # then what could be audited is going to change
                continue
            async with self._book.audit_one:
                chosen = self._next_claim()
                doubt = None if chosen is None else await self._audit_or_give_up(chosen)
            if doubt is not None:
                self._doubts.append(doubt)
                self._mending.set()

    async def _audit_or_give_up(self, claim: Claim) -> Doubt | None:
        try:
            return await self._audit(claim)
        except MissingBlocks as missing:
            log.debug("%s cannot be audited: %s", claim.peer, missing)
            self._book.postpone(claim.peer)
        except SwarmError as failure:
            log.info("an audit of %s was given up: %s", claim.peer, failure)
            self._book.record_failed(claim.peer)
            self._wakeup.set()
        return None

    def _next_claim(self) -> Claim | None:
        ready = [claim for claim in self._claims.values() if claim.num_left >= MIN_TOKENS]
        candidates = [self._book.candidate(each.peer, num_tokens=each.num_left, cost=_cost(each)) for each in ready]
        index = self._book.choose(candidates)
        return None if index is None else ready[index]

    async def _audit(self, claim: Claim) -> Doubt | None:
        """Audit what a claim has now. Returns what is not to be trusted, if anything. Raises `SwarmError`s."""
        window = claim.window(claim.end)
        void = asyncio.Event()
        self._running = claim.end, void
        self._book.spend(_cost(claim))
        examination = examine(self._swarm, self._planner, claim, window, self._inputs.mask(*window))
        try:
            async with owned_task(examination) as examining, owned_task(void.wait()) as changing:
                await asyncio.wait({examining, changing}, return_when=asyncio.FIRST_COMPLETED)
                if void.is_set():  # the session has changed its past: what was computed means nothing
                    return None
                findings = examining.result()
        finally:
            self._running = None
        distance, finding = typical(findings.distances), findings.verdict.name.lower()
        self._swarm.events.emit(
            ServerAudited(claim.peer, claim.span, len(findings.distances), distance, finding, findings.witnesses)
        )
        return self._concluded(claim, window, findings)

    def _concluded(self, claim: Claim, window: tuple[int, int], findings: Findings) -> Doubt | None:
        """What follows from the findings of an audit."""
        clean, pushed_by = claim.clean, claim.pushed_by
        claim.clean, claim.pushed_by = window[1], claim.pushed_by[-1:]
        num_tokens, model = window[1] - window[0], self._swarm.model.name
        evidence = findings.evidence(
            claim.peer, model, claim.span, position=clean, num_tokens=num_tokens, found_at=time.time()
        )
        match findings.verdict:
            case Verdict.CLEAN | Verdict.WITNESS_LIED:
                self._book.record_clean(claim.peer)
                if findings.verdict is Verdict.WITNESS_LIED and findings.accuser is not None:
                    self._swarm.audits.shut_out(evidence.against(findings.accuser, claim.peer))
                return None
            case Verdict.LIED:
                self._swarm.audits.shut_out(evidence)
                return Doubt(claim.span, clean, f"{claim.peer} was found lying", liar=claim.peer)
            case Verdict.MISLED:
                claim.pushed_by = ()  # from now on, the client sends it everything
                for upstream in pushed_by:
                    self._swarm.measurements.broken_pairs.add_for_good(upstream, claim.peer)
                names = " or ".join((*pushed_by, claim.peer))
                return Doubt(claim.span, clean, f"{names} computes or pushes something else than it should")
            case Verdict.UNSETTLED:
                self._book.postpone(claim.peer)
                names = " and ".join((claim.peer, *findings.witnesses))
                return Doubt(claim.span, clean, f"{names} differ, and no other server decides", can_be_mended=False)


def _cost(claim: Claim) -> float:
    """What an audit of a claim costs: a witness computes all tokens, unless it has the first of them in its cache."""
    server = claim.server
    return audit_cost(claim.end, len(claim.span), decode_speed=server.decode_speed, prefill_speed=server.prefill_speed)
