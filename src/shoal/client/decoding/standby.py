"""What is done for a session while nobody waits for it.

Servers that fail between two steps are replaced before the next, others are kept warm to take the places of those that
fail or go away, and servers are left where others are faster. The session itself owns the one procedure that mends a
ring; here is decided when it is needed, and what spare servers are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.swarm.swarm import Swarm, holding
from shoal.concurrency import now
from shoal.errors import MissingBlocks, SwarmError
from shoal.policy.moving import pays_to_move, replay_seconds

log = logging.getLogger(__name__)

STANDBY_LAG_TOKENS = 32
"""A spare server is given what it lacks when that is so much: a pass for so many costs hardly more than for one."""
STANDBY_STEP_TOKENS = 128
"""At most so much at once: whoever decodes on that server waits for a pass at most."""
MAINTENANCE_SECONDS = 10.0
"""How long after no spare server could be found one is looked for again."""

REROUTE_CHECK_TOKENS = 32
"""So often it is considered whether others would be faster."""


class StandbyManager:
    """The spare servers of a session's `pipeline`, and the task that looks after both. It has to be stopped.

    Whoever changes the lane holds `busy`; `repair_pipeline` replaces, under it, those that have failed.
    """

    def __init__(
        self,
        swarm: Swarm,
        tokens: SessionInputs,
        planner: RoutePlanner,
        pipeline: Pipeline,
        *,
        busy: asyncio.Lock,
        repair_pipeline: Callable[[], Awaitable[None]],
    ) -> None:
        self.pipeline = pipeline
        self.standbys: dict[Stage, Pipeline] = {}
        """By whom they can replace."""
        self._swarm = swarm
        self._tokens = tokens
        self._planner = planner
        self._busy = busy
        self._repair_pipeline = repair_pipeline
        self._wakeup = asyncio.Event()
        self._no_standby_until: WeakKeyDictionary[Stage, float] = WeakKeyDictionary()
        self._looked_at = 0
        self._task = asyncio.create_task(self._maintain())

    def wake(self) -> None:
        """There may be something to do."""
        self._wakeup.set()

    def stop(self) -> None:
        """Look after nothing any more. The spare servers are still to be disconnected."""
        self._task.cancel()

    def promote(self, stage: Stage) -> bool:
        """Let the spare server of another take its place, if there is one that can: returns whether there is.

        What it knew that had not been answered, it has to say again.
        """
        standby = self.standbys.get(stage)
        if standby is None or not standby.is_open or any(each.error is not None for each in standby.stages):
            return False
        del self.standbys[stage]
        for each in standby.stages:
            each.notify = self.pipeline.notify
        sink = self.pipeline.sink(self.pipeline.stages.index(stage))
        if standby.stages[-1].num_computed > sink.num_tokens:
            standby.stages[-1].rewind_to(sink.num_tokens)
            self._tokens.epoch += 1
        if sink is self.pipeline.outputs:
            self.pipeline.outputs.logits.clear()
        self.pipeline.replace(stage, standby.stages)
        return True

    # -- the chores ---------------------------------------------------------------------------------------------------

    async def _maintain(self) -> None:
        while True:
            is_quiet = False
            try:
                async with asyncio.timeout(MAINTENANCE_SECONDS):
                    await self._wakeup.wait()
            except TimeoutError:
                is_quiet = True
            self._wakeup.clear()
            try:
                await self._repair()
                await self._consider_rerouting()
                for stage in list(self.pipeline.stages):
                    if stage in self.pipeline.stages and (stage.is_leaving or self._swarm.config.standby):
                        await self._feed_standby(stage, all_of_it=is_quiet)
                await self._switch_to_standby()
            except SwarmError as failure:  # whoever takes the next step will be told if it still matters
                log.info("%s", failure)
            for stage in [each for each in self.standbys if each not in self.pipeline.stages]:
                await self.standbys.pop(stage).disconnect()

    async def _repair(self) -> None:
        """Replace those that have failed while no step runs."""
        if not self._busy.locked() and any(stage.error is not None for stage in self.pipeline.stages):
            async with self._busy:
                await self._repair_pipeline()

    async def _consider_rerouting(self) -> None:
        """Now and then, see for one of the servers whether leaving it for faster ones pays, the replay included."""
        num_tokens = self._tokens.num_tokens
        if num_tokens < self._looked_at + REROUTE_CHECK_TOKENS:
            self._looked_at = min(self._looked_at, num_tokens)
            return
        self._looked_at = num_tokens
        stage = self.pipeline.stages[num_tokens // REROUTE_CHECK_TOKENS % len(self.pipeline.stages)]
        if stage.is_leaving or stage.error is not None:
            return
        with contextlib.suppress(MissingBlocks):  # then there is no choice
            better = await self._planner.replacement(stage, self.pipeline, {holding(stage.hop.server)})
            if stage not in self.pipeline.stages:
                return
            present = self._planner.price(stage, self.pipeline)
            stage.is_leaving |= pays_to_move(
                step_seconds=present.seconds,
                better_step_seconds=better.seconds,
                replay_seconds=replay_seconds(better.hops, self._planner.batch_size * num_tokens),
                # as many as it has had, perhaps
                num_steps_left=min(num_tokens, self._planner.num_steps_left),
            )
            if stage.is_leaving:
                log.info("%s takes %.3g s a step; elsewhere, %.3g s", stage.peer, present.seconds, better.seconds)

    async def _feed_standby(self, stage: Stage, *, all_of_it: bool) -> None:
        """Have a spare server for a share, and let it compute what it lacks of what that has answered."""
        standby = self.standbys.get(stage)
        if standby is not None and (failed := standby.next_failure()) is not None:
            assert failed.error is not None
            self._swarm.blame(failed.error)
            await self.standbys.pop(stage).disconnect()
            standby = None
        if standby is None:
            if now() < self._no_standby_until.get(stage, 0.0):
                return
            self._no_standby_until[stage] = now() + MAINTENANCE_SECONDS
            route = await self._planner.replacement(stage, self.pipeline, {holding(stage.hop.server)})
            standby = self._planner.pipeline(route, stage.history, self.wake)
            self.standbys[stage] = standby
        if not standby.is_open:
            await standby.open()
        standby.settle()
        lag = stage.num_computed - min(each.num_requested for each in standby.stages)
        if lag >= STANDBY_LAG_TOKENS or all_of_it or stage.is_leaving:
            await standby.ask(stage.num_computed, max_tokens=None if stage.is_leaving else STANDBY_STEP_TOKENS)

    async def _switch_to_standby(self) -> None:
        """Leave the servers that are going away, while no step runs, as soon as others are warm."""
        for stage, standby in list(self.standbys.items()):
            lag = stage.num_computed - min(each.num_computed for each in standby.stages)
            if not (stage.is_leaving and standby.is_open and lag <= STANDBY_LAG_TOKENS):
                continue
            async with self._busy:
                if stage in self.pipeline.stages and stage.error is None and self.promote(stage):
                    await stage.disconnect()
