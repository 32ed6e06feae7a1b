"""Work for a session between its steps: repairs, standby servers, and moves to faster servers.

The session owns its pipeline, and the procedure that repairs it. The manager here decides when a repair is due, keeps
standbys warm, and puts a standby in the place of a server that fails or leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from shoal.client.decoding.epoch import EpochReason
from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.swarm.known.directory_cache import holding
from shoal.client.swarm.swarm import Swarm
from shoal.concurrency import now
from shoal.errors import MissingBlocks, SwarmError
from shoal.policy.routing.switching import Looks, pays_to_move, replay_seconds

log = logging.getLogger(__name__)

STANDBY_LAG_TOKENS = 32
"""A standby is fed when it lacks this many tokens: a pass over 32 tokens costs hardly more than a pass over one."""
STANDBY_STEP_TOKENS = 128
"""The most tokens that a standby is fed at once: other sessions that decode on its server wait for one pass at most."""
MAINTENANCE_SECONDS = 10.0
"""The manager looks after a quiet session at this interval, and waits as long before it seeks a standby again."""


async def compute_beside(
    pipeline: Pipeline,
    num_tokens: int,
    news: asyncio.Event,
    *,
    max_tokens: int | None = None,
    asked: Callable[[], None] = lambda: None,
) -> None:
    """Let the servers of a pipeline that is not the session's compute its first `num_tokens` tokens.

    `news` is set when something comes from them, `asked` is called when they owe something new. `max_tokens` is as for
    `Pipeline.ask`. Raises the error of the first server that fails.
    """
    while True:
        news.clear()
        pipeline.settle()
        if pipeline.stages[-1].progress.num_computed >= num_tokens:
            return
        if (failed := pipeline.next_failure()) is not None:
            assert failed.error is not None
            raise failed.error
        if not pipeline.is_open:
            await pipeline.open()
            continue
        await pipeline.ask(num_tokens, max_tokens=max_tokens)
        asked()
        await news.wait()


class StandbyManager:
    """The standbys of one session. `busy` is held by the task that changes the session's pipeline.

    Before a change between two steps, `take_back` forgets the steps that were sent ahead.
    """

    def __init__(
        self,
        swarm: Swarm,
        inputs: SessionInputs,
        planner: RoutePlanner,
        busy: asyncio.Lock,
        take_back: Callable[[], None],
    ) -> None:
        self.standbys: dict[Stage, Pipeline] = {}
        """For a stage of the session, the servers that can take its place."""
        self._swarm = swarm
        self._inputs = inputs
        self._planner = planner
        self._busy = busy
        self._take_back = take_back
        self._wakeup = asyncio.Event()
        self._no_standby_until: WeakKeyDictionary[Stage, float] = WeakKeyDictionary()
        self._looks = Looks()

    def wake(self) -> None:
        """There may be something to do."""
        self._wakeup.set()

    def promote(self, stage: Stage, pipeline: Pipeline) -> bool:
        """Put the standby of `stage` in its place in the `pipeline`; returns whether there is one that is open.

        The standby may have computed tokens whose outputs the server before it did not deliver. It repeats those.
        """
        standby = self.standbys.get(stage)
        if standby is None or not standby.is_open:
            return False
        del self.standbys[stage]
        sink = pipeline.sink(pipeline.stages.index(stage))
        last = standby.stages[-1]
        if last.progress.num_computed > sink.num_tokens:
            last.rewind_to(sink.num_tokens)
            self._inputs.epoch.advance(EpochReason.STANDBY_AHEAD)
        if sink is pipeline.outputs:
            pipeline.outputs.logits.clear()
        pipeline.replace(stage, standby.stages)
        return True

    async def run(self, pipeline: Pipeline, repair: Callable[[], Awaitable[None]]) -> None:
        """Look after the session until this is cancelled. The standbys have to be disconnected then.

        `repair` replaces the failed servers of the `pipeline`. It is called with `busy` held.
        """
        self._looks = Looks(at=now())
        while True:
            is_quiet = False
            try:
                async with asyncio.timeout(MAINTENANCE_SECONDS):
                    await self._wakeup.wait()
            except TimeoutError:
                is_quiet = True
            self._wakeup.clear()
            try:
                await self._repair_if_idle(pipeline, repair)
                await self._consider_rerouting(pipeline)
                for stage in list(pipeline.stages):
                    if stage in pipeline.stages and (stage.is_leaving or self._swarm.config.standby):
                        await self._feed_standby(stage, pipeline, all_of_it=is_quiet)
                await self._switch_to_standbys(pipeline)
            except SwarmError as failure:  # the next step raises it if it still matters
                log.info("%s", failure)
            for stage in [each for each in self.standbys if each not in pipeline.stages]:
                await self.standbys.pop(stage).disconnect()

    async def _repair_if_idle(self, pipeline: Pipeline, repair: Callable[[], Awaitable[None]]) -> None:
        """Replace the servers that have failed, unless a step runs: that replaces them itself."""
        if not self._busy.locked() and any(stage.has_failed for stage in pipeline.stages):
            async with self._busy:
                self._take_back()
                await repair()

    async def _consider_rerouting(self, pipeline: Pipeline) -> None:
        """Now and then, check for some servers whether it pays to move to faster ones, the replay included."""
        num_tokens = self._inputs.num_tokens
        self._looks = self._looks.cropped(num_tokens)
        if not self._looks.is_due(num_tokens, now=now()):
            return
        self._looks = self._looks.looked(num_tokens, now=now())
        excess_seconds = [self._planner.excess_seconds(stage) for stage in pipeline.stages]
        for stage in [pipeline.stages[index] for index in self._looks.stages(excess_seconds)]:
            if stage not in pipeline.stages:  # it was overtaken, or merged with another, during the look before
                continue
            if not (stage.is_leaving or stage.has_failed) and await self._pays_to_leave(stage, pipeline):
                stage.leave()
                self._looks = self._looks.moved()
                return

    async def _pays_to_leave(self, stage: Stage, pipeline: Pipeline) -> bool:
        """Whether the blocks of a stage are better computed elsewhere from now on."""
        num_tokens = self._inputs.num_tokens
        try:
            better = await self._planner.replacement(stage, pipeline, {holding(stage.hop.server)})
        except MissingBlocks:  # then there is no choice
            return False
        if stage not in pipeline.stages or (self._computes_head(stage, pipeline) and not better.hops[-1].server.head):
            return False
        present = self._planner.price(stage, pipeline)
        pays = pays_to_move(
            step_seconds=present.seconds,
            better_step_seconds=better.seconds,
            replay_seconds=replay_seconds(better.hops, self._planner.batch_size * num_tokens),
            # a session is expected to run about as long again as it has run
            num_steps_left=min(num_tokens, self._planner.num_steps_left),
        )
        if pays:
            log.info("%s takes %.3g s a step; elsewhere, %.3g s", stage.peer, present.seconds, better.seconds)
        return pays

    def _computes_head(self, stage: Stage, pipeline: Pipeline) -> bool:
        """Whether a stage computes the output head for the client, whose own may be much slower."""
        return self._swarm.config.remote_head and stage is pipeline.stages[-1] and stage.hop.server.head

    async def _feed_standby(self, stage: Stage, pipeline: Pipeline, *, all_of_it: bool) -> None:
        """Find a standby for a stage, and let it compute what the stage has computed before.

        It is fed in portions. With `all_of_it`, it also gets what is less than a portion.
        """
        standby = self.standbys.get(stage)
        if standby is not None and (failed := standby.next_failure()) is not None:
            assert failed.error is not None
            self._swarm.servers.blame(failed.error)
            await self.standbys.pop(stage).disconnect()
            standby = None
        if standby is None:
            if stage not in pipeline.stages or now() < self._no_standby_until.get(stage, 0.0):
                return
            self._no_standby_until[stage] = now() + MAINTENANCE_SECONDS
            route = await self._planner.replacement(stage, pipeline, {holding(stage.hop.server)})
            standby = self._planner.pipeline(route, stage.history, self.wake)
            self.standbys[stage] = standby
        if not standby.is_open:
            await standby.open()
        standby.settle()
        num_computed = stage.progress.num_computed
        lag = num_computed - min(each.progress.num_requested for each in standby.stages)
        if lag >= STANDBY_LAG_TOKENS or all_of_it or stage.is_leaving:
            await standby.ask(num_computed, max_tokens=None if stage.is_leaving else STANDBY_STEP_TOKENS)

    async def _switch_to_standbys(self, pipeline: Pipeline) -> None:
        """Replace servers that are leaving by standbys that are warm, between two steps."""
        for stage, standby in list(self.standbys.items()):
            lag = stage.progress.num_computed - min(each.progress.num_computed for each in standby.stages)
            if not (stage.is_leaving and standby.is_open and lag <= STANDBY_LAG_TOKENS):
                continue
            async with self._busy:
                self._take_back()
                if stage in pipeline.stages and not stage.has_failed and self.promote(stage, pipeline):
                    await stage.disconnect()
