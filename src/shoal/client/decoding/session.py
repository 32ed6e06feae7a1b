"""A generation in progress: what the servers cache, and what the client keeps so that any of them can be replaced.

A step goes around a ring: to the first server, from each straight to the next, and from the last one back. Each also
sends its outputs to us, off the critical path: they are the inputs of the next, from which that could be rebuilt
anywhere. So there is nothing special about a failure: a replacement lacks everything, and is asked for that as any
server is asked for what it lacks (`shoal.client.decoding.pipeline`).
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch

from shoal.client.decoding.outputs import NoOutputs, Outputs
from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.decoding.standby import StandbyManager
from shoal.client.head.logits import Logits, LogitsRequest
from shoal.client.swarm.connection import CannotRewind
from shoal.client.swarm.swarm import Holding, Swarm
from shoal.errors import ServerBusy, ServerLost, UserError
from shoal.events import SessionClosed, SessionOpened
from shoal.model.peft.factors import Tuning
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import Hop
from shoal.spans import Span

Change = int | tuple[int, ...]
"""What is to be done before the next step: forget everything after so many tokens, or rearrange the batch."""


class Session:
    """The decoding state of a batch of sequences across a route. Runs on the client's event loop.

    It may get `max_length` tokens long. Servers are chosen that have room for `expected_length`, by default the same.
    """

    def __init__(
        self,
        swarm: Swarm,
        span: Span,
        *,
        batch_size: int,
        max_length: int,
        expected_length: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.span = span
        self._swarm = swarm
        self._tokens = SessionInputs(swarm.store)
        self._planner = RoutePlanner(
            swarm,
            self._tokens,
            tuning or Tuning(),
            batch_size=batch_size,
            max_length=max_length,
            announced_length=max_length if expected_length is None else min(expected_length, max_length),
        )
        self._changes: list[Change] = []
        self._news = asyncio.Event()
        self._busy = asyncio.Lock()
        self._step: asyncio.Task[Any] | None = None  # the one that runs
        self._standby: StandbyManager | None = None  # from the first step on
        self._closed = False

    @property
    def batch_size(self) -> int:
        return self._planner.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._planner.batch_size = batch_size

    def expect(self, num_tokens: int) -> None:
        """It will perhaps get so long: servers that are chosen from now on need room for that."""
        self._planner.announced_length = max(self._planner.announced_length, num_tokens)

    @property
    def was_opened(self) -> bool:
        """Whether any server knows of it."""
        return self._standby is not None or self._step is not None

    @property
    def _pipelines(self) -> list[Pipeline]:
        """The one on which steps run, and those of the spare servers."""
        return [] if self._standby is None else [self._standby.pipeline, *self._standby.standbys.values()]

    @property
    def _stages(self) -> list[Stage]:
        return self._pipelines[0].stages if self._pipelines else []

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Where it runs at present."""
        return tuple(stage.hop for stage in self._stages)

    @property
    def standbys(self) -> tuple[Hop, ...]:
        """The servers that are kept warm to take another's place."""
        return tuple(stage.hop for pipeline in self._pipelines[1:] for stage in pipeline.stages if pipeline.is_open)

    def crop(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` tokens."""
        self._changes.append(num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        self.batch_size = len(rows)
        self._changes.append(tuple(rows))

    async def step(
        self,
        hidden_BTD: torch.Tensor,
        position: int,
        positions_BT: torch.Tensor | None,
        mask_BS: torch.Tensor | None,
        logits_request: LogitsRequest | None = None,
    ) -> torch.Tensor | Logits:
        """Append the inputs of the tokens from `position` on; returns the span's outputs for them, [B, T, D].

        With a `logits_request` to the output head, its answer instead, if the last server has a head. If it fails or is
        cancelled, the session is as if it had never been called.
        """
        async with self._busy:
            if self._closed:
                raise UserError("this session is closed")
            self._step = asyncio.current_task()
            try:
                self._changes.append(position)  # what an interrupted step may have left
                await self._make_changes()
                self._tokens.append(as_received(hidden_BTD, self._swarm.config.wire), positions_BT, mask_BS)
                outputs = Outputs(position)
                await self._run_until(self._is_answered, outputs, logits_request)
                return outputs.joined()
            finally:
                self._step = None
                if self._standby is not None:
                    self._standby.wake()

    # -- going back, and rearranging ----------------------------------------------------------------------------------

    async def _make_changes(self) -> None:
        """Do what was asked for since the last step, once the inputs of all servers are known up to there."""
        while self._changes:
            change = self._changes[0]
            if isinstance(change, tuple):
                await self._run_until(self._is_settled)
                self._tokens.select_rows(change)
                others = dict.fromkeys(stage.history for stage in self._all_stages())
                others.pop(self._tokens.inputs, None)
                for history in others:  # each once: that of a spare server is that of the one that it may replace
                    history.select_rows(change)
                for stage in self._all_stages():
                    stage.select_rows(change)
                self._tokens.epoch += 1
            elif self._reaches_beyond(change):
                self._tokens.crop(change)
                await self._run_until(self._is_settled)
                for stage in self._all_stages():
                    stage.crop(change)
                self._tokens.epoch += 1
            self._changes.pop(0)

    def _all_stages(self) -> list[Stage]:
        """Those of the spare servers too."""
        return [stage for pipeline in self._pipelines for stage in pipeline.stages]

    def _reaches_beyond(self, num_tokens: int) -> bool:
        """Whether anything is known or asked beyond so many tokens."""
        ends = (max(stage.num_tokens, stage.num_requested) for stage in self._all_stages())
        return max((self._tokens.num_tokens, *ends)) > num_tokens

    def _is_settled(self) -> bool:
        """Whether all inputs are known that any server was given: then nothing depends on what is on its way."""
        return all(stage.num_tokens >= self._tokens.num_tokens for stage in self._stages)

    def _is_answered(self) -> bool:
        """Whether the outputs, or the answer to the question, are here."""
        return bool(self._stages) and self._stages[-1].num_computed >= self._tokens.num_tokens

    def _is_caught_up(self) -> bool:
        """Whether every server is there, and has computed all that there is."""
        num_tokens = self._tokens.num_tokens
        return all(stage.is_open and stage.error is None and stage.num_computed >= num_tokens for stage in self._stages)

    # -- the one procedure --------------------------------------------------------------------------------------------

    async def _run_until(
        self, is_done: Callable[[], bool], outputs: Outputs | None = None, logits_request: LogitsRequest | None = None
    ) -> None:
        """Let the servers compute what they have not, until this is so, replacing those that fail."""
        outputs = outputs or NoOutputs()

        async def act(excluded: Set[Holding]) -> None:
            while not is_done():
                if self._standby is None:
                    route = await self._planner.whole_route(self.span, excluded)
                    self._standby = self._maintain(self._planner.pipeline(route, self._tokens.inputs, self._on_news))
                    self._swarm.events.emit(SessionOpened(id(self), self._swarm.model.name, self.span, self.batch_size))
                pipeline = self._standby.pipeline
                pipeline.outputs, pipeline.logits_request = outputs, logits_request
                await self._check(pipeline)
                await self._repair_pipeline(self._standby, excluded)
                await self._exchange(pipeline, is_done)

        if not is_done():
            await self._swarm.with_failover(self.span, act)

    async def _exchange(self, pipeline: Pipeline, is_done: Callable[[], bool]) -> None:
        """Ask, and look at what comes. Returns when it is done, or a session has to be opened again."""
        clock, limit = asyncio.get_running_loop().time, self._swarm.config.longest_answer_seconds
        heard_at = clock()
        while True:
            self._news.clear()
            if pipeline.settle():
                heard_at = clock()
            await self._check(pipeline)
            if is_done() or not pipeline.is_open:
                return
            await pipeline.ask(self._tokens.num_tokens)
            await self._check(pipeline)
            try:
                async with asyncio.timeout_at(heard_at + limit):
                    await self._news.wait()
            except TimeoutError:
                silent = next((stage for stage in pipeline.stages if stage.requests), pipeline.stages[-1])
                assert silent.connection is not None
                silent.connection.fail(silent.connection.lost(f"no answer within {limit:g} s"))

    async def _check(self, pipeline: Pipeline) -> None:
        """Raise what has befallen a server, once."""
        while (stage := pipeline.next_failure()) is not None:
            error = stage.error
            assert error is not None
            if isinstance(error, CannotRewind):
                if not stage.is_rewound:
                    raise ServerLost(f"{error.peer} cannot go on with what it was just sent", peer=error.peer)
                await stage.reset()
                continue
            if isinstance(error, ServerBusy):
                # Whoever waits for room holds none: two who wait for each other's would wait for ever.
                for each in self._pipelines:
                    await each.disconnect()
            raise error

    async def _repair_pipeline(self, standby_manager: StandbyManager, excluded: Set[Holding]) -> None:
        """Have a session open on a server for every block."""
        pipeline = standby_manager.pipeline
        for stage in [each for each in pipeline.stages if each.error is not None]:
            if not standby_manager.promote(stage):
                route = await self._planner.replacement(stage, pipeline, excluded)
                pipeline.replace(stage, pipeline.stages_on(route.hops, stage.history))
            await stage.disconnect(goodbye=False)
        await pipeline.merge()
        await pipeline.open()
        await self._check(pipeline)

    # -- meanwhile ----------------------------------------------------------------------------------------------------

    def _maintain(self, pipeline: Pipeline) -> StandbyManager:
        """Look after these servers until the session is closed."""
        repair_pipeline = partial(self._run_until, self._is_caught_up)
        return StandbyManager(
            self._swarm, self._tokens, self._planner, pipeline, busy=self._busy, repair_pipeline=repair_pipeline
        )

    def _on_news(self) -> None:
        """Something came from a server."""
        self._news.set()
        if self._standby is not None and any(stage.is_leaving or stage.error is not None for stage in self._stages):
            self._standby.wake()

    async def close(self) -> None:
        """Let the servers forget it. May be called twice."""
        if self._standby is not None and not self._closed:
            self._swarm.events.emit(SessionClosed(id(self), self._swarm.model.name, self._tokens.num_tokens))
        self._closed = True
        if self._step is not None:
            self._step.cancel()
        if self._standby is not None:
            self._standby.stop()
        async with self._busy:
            for pipeline in self._pipelines:
                await pipeline.disconnect()
