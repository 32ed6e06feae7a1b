"""The servers of a route in a row, and what each of them is asked for next.

    client ──> stage 1 ──> stage 2 ──> ... ──> stage n ──> client       a step: n + 1 trips around the ring
                  │            │
                  └─> client   └─> client                               outputs: the inputs of the next stage

A server is asked for every token that the session has and that the server was not asked for yet: by the server before
it where that one can push, by the client where it cannot. The outputs of a server also go to the client, off the
critical path. There they become the history of the next stage, from which any server can rebuild that stage's cache.

So the pipeline has no code for recovery. A server that takes another's place has computed nothing, and is asked for
everything. The session chooses that server (`shoal.client.decoding.session`).
"""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch

from shoal.client.decoding.epoch import EpochReason
from shoal.client.decoding.opening.page_guesses import Names, PageGuesses
from shoal.client.decoding.opening.page_names import as_digests, page_names
from shoal.client.decoding.opening.stage_opener import StageOpener
from shoal.client.decoding.outputs import Outputs, Sink
from shoal.client.decoding.pending_step import PendingStep, usual_seconds
from shoal.client.decoding.progress import StageProgress, StageStatus, awaited_steps
from shoal.client.decoding.push_links import PushLinks
from shoal.client.decoding.receipts.receipt_check import ReceiptCheck
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.head.logits import LogitsRequest
from shoal.client.history.history import History
from shoal.client.swarm.answers import named_tensors
from shoal.client.swarm.swarm import Swarm
from shoal.concurrency import done_although_cancelled, now
from shoal.errors import PeerError
from shoal.events import StageReplaced
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.lateness import Awaited
from shoal.policy.routing.prompt_pieces import (
    MOST_IN_FLIGHT,
    MOST_TOKENS_IN_FLIGHT,
    SHORT_TOKENS,
    piece_length,
    ring_cost,
)
from shoal.policy.routing.route import Hop
from shoal.protocol import MAX_STEP_TOKENS
from shoal.spans import Span
from shoal.tensors import TensorName

log = logging.getLogger(__name__)


class Pipeline:
    """The stages of a session on the servers of a route, in order.

    `history` has the inputs of the first stage. What the last server answers goes to `outputs`; with a
    `logits_request` it is asked for logits instead of hidden states, if it has a head. `expected_length` says for how
    many tokens a server needs room. `notify` is called when something came from a server. Tokens from `end` on are not
    for this pipeline.
    """

    def __init__(
        self,
        swarm: Swarm,
        inputs: SessionInputs,
        tuning: ActiveAdapters,
        hops: Sequence[Hop],
        history: History,
        *,
        expected_length: Callable[[], int],
        outputs: Outputs,
        notify: Callable[[], None],
        end: int | None = None,
    ) -> None:
        self.outputs = outputs
        self.logits_request: LogitsRequest | None = None
        self._swarm = swarm
        self._inputs = inputs
        self._tuning = tuning
        self._opener = StageOpener(swarm, inputs, tuning, expected_length=expected_length)
        self._guesses = PageGuesses(swarm.store.pages, inputs, tuning)
        self._end = end
        self._cut: tuple[tuple[Hop, ...], int, int] | None = None  # the servers and the end of a prompt, and its pieces
        self.notify = notify
        self.links = PushLinks(swarm.push_rules)
        self.receipts = ReceiptCheck(swarm)
        self.stages = self.stages_on(hops, history)
        self.awaited: dict[Stage, Awaited] = {}
        """The step that each server owes, and since when."""

    def stages_on(self, hops: Sequence[Hop], history: History) -> list[Stage]:
        """New stages on these hops. The first has this history; the histories of the others follow from it."""
        histories = (history, *(History(self._swarm.store) for _ in hops[1:]))
        return [Stage(hop, each, self.notify) for hop, each in zip(hops, histories, strict=True)]

    def replace(self, stage: Stage, others: Sequence[Stage]) -> None:
        """These stages take the place of one, and report to this pipeline."""
        index = self.stages.index(stage)
        for other in others:
            other.notify = self.notify
        self.stages[index : index + 1] = others
        self._swarm.events.emit(StageReplaced(stage.peer, tuple(each.peer for each in others)))

    def overtake(self, stage: Stage, second: Pipeline) -> None:
        """The stages of another pipeline, which has computed what `stage` owes, take its place.

        They have the history of `stage`. The stages behind it are asked again: it may push after all, and wrongly.
        """
        index = self.stages.index(stage)
        second.outputs.move_to(self.sink(index))
        self.replace(stage, second.stages)
        self._inputs.epoch.advance(EpochReason.OVERTAKEN)
        for later in self.stages[index + len(second.stages) :]:
            later.forget_pending()

    async def merge(self) -> None:
        """Where two stages in a row are on one server, make them one: one session takes half the room of two."""
        index = 0
        while index + 1 < len(self.stages):
            first, second = self.stages[index : index + 2]
            new = next((stage for stage in (second, first) if stage.needs_opening), None)
            span = Span(first.hop.span.start, second.hop.span.end)
            if new is None or first.peer != second.peer or span not in new.hop.server.span:
                index += 1
                continue
            self.stages[index : index + 2] = self.stages_on([Hop(new.hop.server, span)], first.history)
            for stage in (first, second):
                await stage.disconnect()

    @property
    def is_open(self) -> bool:
        """Whether every server can be asked."""
        return all(stage.is_open for stage in self.stages)

    def sink(self, index: int) -> Sink:
        """Where the outputs of the stage at `index` go."""
        return self.outputs if index == len(self.stages) - 1 else self.stages[index + 1]

    def pusher_to(self, stage: Stage) -> str | None:
        """The server that pushes its outputs to this one; None if the client sends it everything."""
        index = self.stages.index(stage)
        upstream = self.stages[index - 1] if index else None
        return upstream.peer if upstream is not None and self.links.pushes(upstream, stage) else None

    # -- listening ----------------------------------------------------------------------------------------------------

    def settle(self) -> bool:
        """Look at the answers that have come; returns whether any was right."""
        has_progress = False
        for index, stage in enumerate(self.stages):
            if stage.settle(self.sink(index), self.outputs, wire=self._swarm.config.wire, mask=self._inputs.mask):
                has_progress = True
                awaited = self.awaited.get(stage)
                waited = None if awaited is None else now() - awaited.since
                self._swarm.record_answer(stage.hop, stage.take_timings(), waited=waited)
            stage.history.settle(stage.progress.num_computed)
        self.receipts.check(self.stages)
        self._note_awaited()
        for index, (upstream, downstream) in enumerate(pairwise(self.stages)):
            if (position := self.links.break_failed(upstream, downstream)) is not None:
                log.info("%s cannot push to %s", upstream.peer, downstream.peer)
                self._inputs.epoch.advance(EpochReason.PUSH_FAILED)  # a push that arrives nevertheless is too late
                for later in self.stages[index + 1 :]:
                    later.unrequest_from(position)
        return has_progress

    def _note_awaited(self) -> None:
        """Note which step each server owes from now on."""
        before, self.awaited = self.awaited, {}
        for stage, step in zip(self.stages, awaited_steps([each.progress for each in self.stages]), strict=True):
            if step is not None:
                known = before.get(stage)
                if known is None or known.key != step.key:
                    is_proven = self._swarm.measurements.is_confirmed(stage.peer)
                    known = Awaited(step.key, now(), step.usual_seconds, is_proven)
                self.awaited[stage] = known

    def next_failure(self) -> Stage | None:
        """A stage whose server has failed, each once. What that server pushed may be wrong, so it is asked again."""
        for index, stage in enumerate(self.stages):
            if stage.status is StageStatus.FAILED:
                stage.mark_reported()
                if later := self.stages[index + 1 :]:
                    self._inputs.epoch.advance(EpochReason.SERVER_FAILED)
                for each in later:
                    each.forget_pending()
                return stage
        return None

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(self, limit: int, *, max_tokens: int | None = None) -> None:
        """Ask the servers for those of the first `limit` tokens that they were not asked for, as far as they can be.

        With `max_tokens`, a server gets one step at a time, of at most that many tokens.
        """
        for index in reversed(range(len(self.stages))):
            with contextlib.suppress(PeerError):  # the stage keeps the error
                await self._ask(index, limit, max_tokens)
        self._note_awaited()

    async def _ask(self, index: int, limit: int, max_tokens: int | None) -> None:
        stage = self.stages[index]
        steps_ahead = MOST_IN_FLIGHT if max_tokens is None else 1
        while stage.progress.num_requested < min(stage.num_tokens, limit):
            run = self._run(index)
            if not run or not all(_has_room(each.progress, steps_ahead) for each in run):
                return
            epoch = self._inputs.epoch.number
            for each in run:
                if each.is_open:
                    await each.sync(epoch, self.links.neighbors_of(each))
            if self._inputs.epoch.number != epoch or not all(each.is_open for each in run):
                continue  # something happened meanwhile, perhaps to a standby: begin again with what is so now
            steps, tensors = self._steps(index, run, limit, max_tokens or MAX_STEP_TOKENS)
            for each, step in zip(run, steps, strict=True):
                each.expect(step)
            self._inputs.are_new = False
            await stage.send(steps[0], tensors, hops_left=len(run) - 1, last=steps[-1])

    def _run(self, index: int) -> list[Stage]:
        """The stage at `index` and those to which its next step is pushed on; empty if its server cannot be asked."""
        stage = self.stages[index]
        if not self._can_ask(stage):
            return []
        run, position = [stage], stage.progress.num_requested
        for upstream, downstream in pairwise(self.stages[index:]):
            lacks_step = downstream.progress.num_requested == position and downstream.num_tokens <= position
            if not (lacks_step and self._can_ask(downstream) and self.links.pushes(upstream, downstream)):
                break
            run.append(downstream)
        return run

    def _can_ask(self, stage: Stage) -> bool:
        return stage.is_open and stage.progress.accepts(self._inputs.epoch.number)

    def _steps(
        self, index: int, run: Sequence[Stage], limit: int, max_tokens: int
    ) -> tuple[list[PendingStep], dict[TensorName, torch.Tensor]]:
        """The next step of each server of a run that begins at `index`, and the tensors for the first of them."""
        stage, start = run[0], run[0].progress.num_requested
        limit = self._inputs.within_step(start, limit)
        batch_size = self._inputs.like.shape[0]
        length = max(1, max_tokens // batch_size)
        if len(run) > 1:
            length = min(length, self._piece_length(run, start, limit))
        end = min(start + length, stage.num_tokens, limit)
        inputs_BTD = stage.history.between(start, end)
        steps: list[PendingStep] = []
        for offset, each in enumerate(run):
            logits_request = self._logits_request_for(index + offset)
            known = self.sink(index + offset).num_tokens if logits_request is None else 0
            num_logits = 0
            if logits_request is not None:
                num_logits = max(0, end - max(start, self.outputs.logits_from))
            steps.append(
                PendingStep(
                    epoch=self._inputs.epoch.number,
                    position=start,
                    inputs=inputs_BTD.shape,
                    dtype=inputs_BTD.dtype,
                    logits_request=logits_request,
                    num_logits=num_logits,
                    usual_seconds=usual_seconds(each.hop, batch_size * (end - start)),
                    skip=0 if offset else max(0, min(known, end) - start),
                    pushed=offset > 0,
                )
            )
        return steps, named_tensors(inputs_BTD, self._inputs.positions(start, end), self._inputs.mask(start, end))

    def _piece_length(self, run: Sequence[Stage], start: int, limit: int) -> int:
        """How long the pieces are in which these servers get the tokens up to `limit`: of one length to the end."""
        hops = tuple(stage.hop for stage in run)
        if self._cut is None or self._cut[:2] != (hops, limit):
            if limit - start <= SHORT_TOKENS:
                return SHORT_TOKENS
            ring = ring_cost(hops, self._swarm.measurements.measured())
            self._cut = hops, limit, piece_length(ring, limit - start, rows=self._inputs.like.shape[0])
        return self._cut[2]

    def _logits_request_for(self, index: int) -> LogitsRequest | None:
        """The logits that the stage at `index` is asked for instead of hidden states, if any."""
        return self.logits_request if index == len(self.stages) - 1 and self.stages[index].hop.server.head else None

    # -- opening ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the session on every server that has not opened it. Stops if a server fails; its stage has the error."""
        new = [stage for stage in self.stages if stage.needs_opening]
        await asyncio.gather(*(self._opener.connect(stage) for stage in new))
        if any(stage.has_failed for stage in self.stages):
            return
        self.links.link(self.stages)
        guesses = self._guesses.guess(new, self._most_cached)
        for stage in new:
            has_names = await self._send_open(stage, guesses.get(stage))
            # The outputs that one server has in its cache may be inputs that the next one has, so they are waited for.
            if has_names and not guesses:
                await self._await_opened(stage)
        for stage in new:
            await self._await_opened(stage, guesses.get(stage))

    async def _send_open(self, stage: Stage, guess: Names | None) -> bool:
        """Ask the server to open the session; returns whether it may have the first tokens in its cache."""
        if stage.connection is None:  # somebody has closed it meanwhile
            return False
        index = self.stages.index(stage)
        if index == len(self.stages) - 1:
            self.outputs.logits.clear()
        digests = as_digests(self._names(stage) if guess is None else guess)
        neighbors = self.links.neighbors_of(stage)
        await self._opener.send_open(stage, digests, skip=self.sink(index).num_tokens, neighbors=neighbors)
        return digests is not None

    async def _await_opened(self, stage: Stage, guess: Names | None = None) -> None:
        sink = self.sink(self.stages.index(stage))
        if guess is None:
            await self._opener.await_opened(stage, sink)
            return
        await self._opener.await_opened(stage, sink, partial(self._guesses.is_right, stage, guess))
        if stage.needs_opening:
            self._guesses.forget(stage)

    def _names(self, stage: Stage) -> Names:
        """The names of the pages with which the inputs of a stage begin, if a server may have them in its cache."""
        num_tokens = min(stage.num_tokens, self._most_cached(stage))
        if num_tokens <= 0 or self._inputs.are_new:
            return []
        span = stage.hop.span
        return page_names(stage.history.between(0, num_tokens), span, self._inputs, self._tuning.names(span))

    def _most_cached(self, stage: Stage) -> int:
        """How many tokens a server may have in its cache: it keeps no logits, so those that need them are computed."""
        num_tokens = self._inputs.num_tokens if self._end is None else min(self._inputs.num_tokens, self._end)
        if self._logits_request_for(self.stages.index(stage)) is None:
            return num_tokens
        return min(num_tokens, self.outputs.logits_from)

    async def remember(self) -> None:
        """Remember what the servers were given, so that a later session of the same text asks all of them at once."""
        await self._guesses.remember(self.stages)

    async def disconnect(self) -> None:
        """Let the servers forget the session, also if the caller is cancelled meanwhile."""
        await done_although_cancelled(*(stage.disconnect() for stage in self.stages))


async def close_all(pipelines: Sequence[Pipeline]) -> None:
    """Let all servers forget the session, also if the caller is cancelled meanwhile; a caller who is not remembers."""
    await done_although_cancelled(*(each.disconnect() for each in pipelines))
    await asyncio.gather(*(each.remember() for each in pipelines))


def _has_room(progress: StageProgress, steps_ahead: int) -> bool:
    """Whether a server may be asked for one more step, of any size, before it has answered those that are pending."""
    num_tokens = sum(step.inputs[:2].numel() for step in progress.pending)
    return len(progress.pending) < steps_ahead and num_tokens <= MOST_TOKENS_IN_FLIGHT - MAX_STEP_TOKENS
