"""A generation in progress, on servers any of which may vanish at any moment.

The rule that everything follows from: **the client's copy of the inputs is the truth.** The session keeps the inputs of
every server of its route (`shoal.client.history`). A server's cache can be rebuilt from them anywhere, so a server that
is lost is replaced by one that has computed nothing, and that one is asked for everything, just as a server in a long
prefill is. There is no other recovery.

`Session._run_until` is the one loop that does this. It repeats three things until a condition holds: replace the
servers that have failed, open the session on new ones, and exchange steps and answers. A step, a crop that has to wait
for inputs, and the repair of an idle session differ only in the condition.

What belongs to a session:

    Session           what the caller asks for, in order; owns the pipeline and the task of the standby manager
    ├─ SessionInputs  the tokens: inputs of the first block, positions, padding, and the epoch
    ├─ RoutePlanner   which servers could be used
    ├─ Pipeline       which server is asked for what
    │  └─ Stage       the talk with one server; its StageProgress says how far that server has come
    ├─ Race           which other servers compute a step that is late
    └─ StandbyManager what is done between two steps

A step is named by its epoch and position. When steps on their way become wrong, the session begins a new epoch.
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch

from shoal.client.decoding.auditing.auditor import SessionAuditor
from shoal.client.decoding.epoch import EpochReason
from shoal.client.decoding.outputs import NoOutputs, Outputs
from shoal.client.decoding.pipeline import Pipeline, close_all
from shoal.client.decoding.race import Race
from shoal.client.decoding.receipts.doubt import Doubt
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.session_inputs import SessionInputs, StepInputs
from shoal.client.decoding.stage import Stage
from shoal.client.decoding.standby import StandbyManager
from shoal.client.decoding.state import SessionState, states_of
from shoal.client.head.logits import Logits, LogitsRequest
from shoal.client.swarm.known.directory_cache import Holding
from shoal.client.swarm.swarm import Swarm
from shoal.concurrency import first_of, raise_error_of
from shoal.errors import CannotRewind, Interrupted, ServerBusy, ServerLost, SwarmError, UserError
from shoal.events import SessionClosed, SessionOpened, TextDoubtful
from shoal.model.peft.factors import ActiveAdapters
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import Hop
from shoal.spans import Span

log = logging.getLogger(__name__)

IDLE_WAIT_SECONDS = 5.0
"""How long the repair of an idle session waits for a server at a time: the next step cannot begin before."""

Change = int | tuple[int, ...]
"""What is due before the next step: to forget all tokens after the first n, or to rearrange the rows of the batch."""


class Session:
    """The decoding of a batch of sequences through the blocks of `span`. Runs on the client's event loop.

    It has at most `max_length` tokens. Servers are chosen that have room for `expected_length` tokens, by default for
    `max_length`. Servers share cached beginnings among sessions of the same `salt`, by default that of the client.
    """

    def __init__(
        self,
        swarm: Swarm,
        span: Span,
        *,
        batch_size: int,
        max_length: int,
        expected_length: int | None = None,
        tuning: ActiveAdapters | None = None,
        salt: str | None = None,
    ) -> None:
        self.span = span
        self._swarm = swarm
        self._inputs = SessionInputs(swarm.store, salt=swarm.salt if salt is None else salt)
        self._planner = RoutePlanner(
            swarm,
            self._inputs,
            tuning or ActiveAdapters(),
            batch_size=batch_size,
            max_length=max_length,
            announced_length=max_length if expected_length is None else min(expected_length, max_length),
        )
        self._changes: list[Change] = []
        self._news = asyncio.Event()
        self._busy = asyncio.Lock()
        self._step: asyncio.Task[Any] | None = None  # the task that runs a step now
        self._pipeline: Pipeline | None = None  # from the first step on
        self._race = Race(swarm, self._planner, self._on_news)
        self._standby = StandbyManager(swarm, self._inputs, self._planner, self._busy, self._take_back_ahead)
        self._auditor = SessionAuditor(swarm, self._inputs, self._planner)
        self._maintenance: asyncio.Task[None] | None = None  # as long as there is a pipeline
        self._closed = False
        self.num_cached: int | None = None
        """How many of its first tokens all servers had in their caches when it was opened; None before that."""
        self.doubtful: tuple[TextDoubtful, ...] = ()
        """The tokens that were chosen from outputs which turned out not to be trusted, and why."""

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return self._planner.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._planner.batch_size = batch_size

    def expect(self, num_tokens: int) -> None:
        """Servers that are chosen from now on need room for this many tokens."""
        self._planner.announced_length = max(self._planner.announced_length, num_tokens)

    @property
    def was_opened(self) -> bool:
        """Whether any server may know of the session."""
        return self._pipeline is not None or self._step is not None

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, so that it computes no more."""
        return self._closed

    @property
    def _pipelines(self) -> list[Pipeline]:
        """The one on which steps run, and those of the standbys."""
        return [] if self._pipeline is None else [self._pipeline, *self._standby.standbys.values()]

    @property
    def _stages(self) -> list[Stage]:
        return [] if self._pipeline is None else self._pipeline.stages

    @property
    def _all_stages(self) -> list[Stage]:
        return [stage for pipeline in self._pipelines for stage in pipeline.stages]

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The servers that the session runs on at present, in the order of their blocks."""
        return tuple(stage.hop for stage in self._stages)

    @property
    def num_audited(self) -> int:
        """How many of its first tokens were computed again by other servers, with the same results."""
        return self._auditor.num_audited(self._stages)

    @property
    def standbys(self) -> tuple[Hop, ...]:
        """The servers that are kept warm to take another's place."""
        return tuple(stage.hop for each in self._standby.standbys.values() if each.is_open for stage in each.stages)

    @property
    def state(self) -> SessionState:
        """What the session looks like at this moment."""
        standbys = self._all_stages[len(self._stages) :]
        return SessionState(self._inputs.epoch.number, states_of(self._stages), states_of(standbys))

    def crop(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`, before the next step."""
        self._changes.append(num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        self.batch_size = len(rows)
        self._changes += [*self._inputs.first_ahead, tuple(rows)]

    async def step(
        self,
        hidden_BTD: torch.Tensor,
        position: int,
        positions_BT: torch.Tensor | None,
        mask_BS: torch.Tensor | None,
        logits_request: LogitsRequest | None = None,
        *,
        ahead: Sequence[StepInputs] = (),
    ) -> torch.Tensor | Logits:
        """Append the inputs of the tokens from `position` on; returns the span's outputs for them, [B, T, D].

        `positions_BT` are the position ids, None if tokens are counted; `mask_BS` is 0 where a token is padding. With a
        `logits_request` it returns logits if the last server has an output head. The steps `ahead` are sent behind this
        one, ask for the same of all their tokens, and are not waited for: a next call for the first of these very steps
        does that, any other takes them back. A step that fails or is cancelled leaves the session as it was. Raises
        `UserError` when it is closed, and `SwarmError`s as `Swarm.with_failover` does.
        """
        async with self._busy:
            if self._closed:
                raise UserError("this session is closed")
            raise_error_of(self._maintenance)  # without it, nothing is repaired, moved or audited
            self._step, end = asyncio.current_task(), position + hidden_BTD.shape[1]
            try:
                pipeline = None if self._changes else self._pipeline
                if pipeline is not None and self._inputs.reach_ahead(position, hidden_BTD, ahead):
                    outputs, logits_request = pipeline.outputs, pipeline.logits_request
                else:
                    self._changes.append(position)  # an interrupted step may have left tokens
                    await self._make_changes()
                    self._inputs.append(as_received(hidden_BTD, self._swarm.config.wire), positions_BT, mask_BS)
                    outputs = Outputs.of_step(position, end, logits_request)
                self._inputs.append_ahead(ahead, wire=self._swarm.config.wire)
                await self._run_until(partial(self._is_answered, end), outputs, logits_request)
                assert self._pipeline is not None
                found = outputs.take(end)
                self._auditor.answered(self._pipeline, position, end, found)
                return found
            finally:
                self._step = None
                if self._pipeline is not None:
                    self._standby.wake()

    # -- going back, and rearranging ----------------------------------------------------------------------------------

    def _take_back_ahead(self) -> None:
        """Forget the steps that were sent ahead: they are sent again in their turn."""
        for start in self._inputs.take_back_ahead(self._all_stages):
            self._auditor.cropped(start)

    async def _make_changes(self) -> None:
        """Make the changes that were asked for since the last step, once all inputs are known up to there."""
        while self._changes:
            change = self._changes[0]
            if isinstance(change, tuple):
                await self._run_until(self._is_settled)
                self._inputs.rearrange(change, self._all_stages)
                self._auditor.rearranged(change, self._stages)
            elif self._reaches_beyond(change):
                self._inputs.crop(change)
                await self._run_until(self._is_settled)
                self._inputs.forget(change, self._all_stages)
                self._auditor.cropped(change)
            self._changes.pop(0)

    def _reaches_beyond(self, num_tokens: int) -> bool:
        """Whether any token after the first `num_tokens` is known, or was asked for."""
        ends = (max(stage.num_tokens, stage.progress.num_requested) for stage in self._all_stages)
        return max((self._inputs.num_tokens, *ends)) > num_tokens

    def _is_settled(self) -> bool:
        """Whether the client knows the inputs of every server: then it needs no answer that is on its way."""
        return all(stage.num_tokens >= self._inputs.num_tokens for stage in self._stages)

    def _is_answered(self, end: int) -> bool:
        """Whether the outputs, or the logits, of all tokens before `end` are here."""
        return bool(self._stages) and self._stages[-1].progress.num_computed >= end

    def _is_caught_up(self) -> bool:
        """Whether every server is there and has computed all tokens."""
        return all(each.is_open and each.progress.num_computed >= self._inputs.num_tokens for each in self._stages)

    # -- the one procedure --------------------------------------------------------------------------------------------

    async def _run_until(
        self,
        is_done: Callable[[], bool],
        outputs: Outputs | None = None,
        logits_request: LogitsRequest | None = None,
        *,
        at_most: float | None = None,
    ) -> None:
        """Let the servers compute what they have not computed until `is_done`, and replace those that fail.

        Waits and raises as `Swarm.with_failover` does.
        """
        outputs = outputs or NoOutputs()

        async def act(excluded: Set[Holding]) -> None:
            while not is_done():
                pipeline = self._pipeline or await self._begin(excluded)
                pipeline.outputs, pipeline.logits_request = outputs, logits_request
                await self._raise_failures(pipeline)
                await self._repair(pipeline, excluded)
                try:
                    await self._exchange(pipeline, is_done, excluded)
                finally:
                    await self._race.stop()

        if not is_done():
            await self._swarm.with_failover(self.span, act, at_most=at_most)

    async def _begin(self, excluded: Set[Holding]) -> Pipeline:
        """Choose the first route, and look after its servers until the session is closed."""
        route = await self._planner.whole_route(self.span, excluded)
        self._pipeline = self._planner.pipeline(route, self._inputs.hidden, self._on_news)
        repair = partial(self._run_until, self._is_caught_up, at_most=IDLE_WAIT_SECONDS)
        work = first_of(self._standby.run(self._pipeline, repair), self._auditor.run(self._recover))
        self._maintenance = asyncio.create_task(work)
        self._swarm.events.emit(SessionOpened(id(self), self._swarm.model.name, self.span, self.batch_size))
        return self._pipeline

    async def _exchange(self, pipeline: Pipeline, is_done: Callable[[], bool], excluded: Set[Holding]) -> None:
        """Ask the servers and look at their answers until `is_done`, or until the ring has to be put in order.

        A server that is late is overtaken by another one. Raises the error of a server that fails.
        """
        clock, limit = asyncio.get_running_loop().time, self._swarm.config.longest_answer_seconds
        heard_at = clock()
        while True:
            self._news.clear()
            if pipeline.settle():
                heard_at = clock()
            await self._raise_failures(pipeline)
            if is_done() or not pipeline.is_open:
                return
            await pipeline.ask(self._inputs.num_tokens)
            await self._raise_failures(pipeline)
            if await self._race.run(pipeline, excluded):
                return
            look_at = self._race.look_at(pipeline)
            try:
                async with asyncio.timeout_at(heard_at + limit if look_at is None else min(look_at, heard_at + limit)):
                    await self._news.wait()
            except TimeoutError:
                if clock() < heard_at + limit:
                    continue
                silent = next((stage for stage in pipeline.stages if stage.progress.pending), pipeline.stages[-1])
                assert silent.connection is not None
                silent.connection.fail(silent.connection.lost(f"no answer within {limit:g} s"))

    async def _raise_failures(self, pipeline: Pipeline) -> None:
        """Raise the error of a server that has failed, once. One that only lost its cache is left closed instead."""
        while (stage := pipeline.next_failure()) is not None:
            error = stage.error
            assert error is not None
            if isinstance(error, CannotRewind | Interrupted):
                if isinstance(error, CannotRewind) and not stage.progress.is_rewound:
                    raise ServerLost(f"{error.peer} cannot go on with what it was just sent", peer=error.peer)
                await stage.reset()
                continue
            if isinstance(error, ServerBusy):
                # A session that waits for room holds none. Two that wait for each other's would wait for ever.
                for each in self._pipelines:
                    await each.disconnect()
            raise error

    async def _repair(self, pipeline: Pipeline, excluded: Set[Holding]) -> None:
        """Replace the servers that have failed, and open the session on every new one."""
        for stage in [each for each in pipeline.stages if each.has_failed]:
            if not self._standby.promote(stage, pipeline):
                route = await self._planner.replacement(stage, pipeline, excluded)
                pipeline.replace(stage, pipeline.stages_on(route.hops, stage.history))
            await stage.disconnect(goodbye=False)
        await pipeline.merge()
        await pipeline.open()
        await self._raise_failures(pipeline)
        if self.num_cached is None and pipeline.is_open:
            self.num_cached = min(stage.progress.num_cached for stage in pipeline.stages)

    async def _recover(self, doubt: Doubt) -> None:
        """Compute again what follows from outputs that are not to be trusted, and say which tokens are doubtful."""
        async with self._busy:
            self._take_back_ahead()
            text = TextDoubtful(id(self), self._swarm.model.name, doubt.position, self._inputs.num_tokens, doubt.reason)
            self.doubtful = (*self.doubtful, text)
            self._swarm.events.emit(text)
            if self._closed or not doubt.can_be_mended:
                return
            for stage in self._all_stages:
                doubt.apply_to(stage)
            for pipeline in self._pipelines:
                pipeline.links.unlink_broken()
            self._auditor.distrusted(doubt)
            self._inputs.epoch.advance(EpochReason.DISTRUSTED)
            outputs = Outputs(doubt.position)
            try:
                await self._run_until(self._is_caught_up, outputs, at_most=IDLE_WAIT_SECONDS)
            except SwarmError as failure:  # the next step raises it if it still matters
                log.info("%s", failure)
            else:
                self._auditor.recomputed(outputs.joined())

    # -- between two steps --------------------------------------------------------------------------------------------

    def _on_news(self) -> None:
        """Something came from a server of the pipeline."""
        self._news.set()
        if any(stage.is_leaving or stage.has_failed for stage in self._stages):
            self._standby.wake()

    async def close(self) -> None:
        """End the step that runs, and let the servers forget the session. May be called twice."""
        if self._pipeline is not None and not self._closed:
            self._swarm.events.emit(SessionClosed(id(self), self._swarm.model.name, self._inputs.num_tokens))
        self._closed = True
        if self._step is not None:
            self._step.cancel()
        if self._maintenance is not None:
            self._maintenance.cancel()
            await asyncio.wait([self._maintenance])
        async with self._busy:
            await close_all(self._pipelines)
