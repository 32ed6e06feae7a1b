"""Where a server without blocks goes: its choice in view of the others, and what remains of it beside their claims."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from shoal.errors import ShoalError
from shoal.peers import ServerInfo
from shoal.policy.claims import machines_in, settled, without_span
from shoal.policy.machines.machine import Machine
from shoal.policy.placement.joining import Placed, choose_blocks
from shoal.policy.view import SwarmView
from shoal.server.capacity import max_num_blocks
from shoal.server.placing.description import assumed_capacity
from shoal.server.placing.setup import Surroundings
from shoal.server.placing.swarm_watch import SwarmWatch
from shoal.spans import Span

log = logging.getLogger(__name__)

GIVEN = "its operator chose them"
"""The reason of a server that was told which blocks to serve."""
PAUSE_SECONDS = 30.0
"""How long a server waits that could load neither the new blocks nor the old ones."""


class SpanChooser:
    """Chooses the blocks of a server that has none. `base` is what it announces whatever it does."""

    def __init__(self, around: Surroundings, base: ServerInfo, watch: SwarmWatch) -> None:
        self._around = around
        self.base = base
        self._watch = watch

    async def first(self) -> Placed:
        """The blocks to take at the start: those that are given, or those that help the swarm most.

        Raises `SwarmError` if the directory does not answer.
        """
        around = self._around
        await around.portrait.remember_capacity(around.setup, around.compute.executor)
        if (given := around.config.blocks) is not None:
            self._assume(len(given), SwarmView(around.setup.model.num_blocks))
            return Placed(given, GIVEN)
        view, crowd = await self._watch.read(), await self._watch.crowd()
        self._assume(around.setup.max_blocks, view)
        return self._choose(view, crowd)

    async def again(self, avoids: Callable[[Span], bool]) -> Placed:
        """The blocks to take after others could not be loaded, once there are some that may succeed."""
        around = self._around
        setup = around.setup
        while True:
            log.warning("the server holds no blocks, and tries to take some in %.0f s", PAUSE_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)
            try:
                most = max_num_blocks(around.config, setup.checkpoint, setup.dtype, setup.device)
                view, crowd = await self._watch.read(), await self._watch.crowd()
            except ShoalError as failure:  # no memory yet, or no directory
                log.warning("%s", failure)
                continue
            while most:
                self._assume(most, view)
                placed = self._choose(view, crowd)
                if not avoids(placed.span):
                    return placed
                most //= 2

    async def settle(self, own: ServerInfo) -> Placed:
        """The blocks that remain for `own`, whose claim is announced, beside the claims of others (`policy.claims`).

        Raises `SwarmError` if the directory does not answer.
        """
        others, crowd = await self._watch.read(), await self._watch.crowd()
        return settled(own, others, choose=self._place, now=self._around.clock(), crowd=crowd)

    def _assume(self, max_blocks: int, view: SwarmView) -> None:
        """Announce at most `max_blocks` blocks, with the capacity that was measured, else one that may be assumed."""
        portrait = self._around.portrait
        capacity = portrait.capacity or assumed_capacity(max_blocks, view)
        portrait.capacity = replace(capacity, max_blocks=max_blocks)

    def _choose(self, others: SwarmView, crowd: Sequence[Machine] | None) -> Placed:
        now = self._around.clock()
        own = self._around.portrait.complete(self.base)
        return self._place(without_span(own, now=now), machines_in(others, now=now) if crowd is None else crowd)

    def _place(self, machine: Machine, others: Sequence[Machine]) -> Placed:
        # Every server can compute what another one would choose: equal machines draw equal numbers.
        rng = random.Random(machine.peer)  # noqa: S311 - it decides between equally good spans
        num_blocks, rule = self._around.setup.model.num_blocks, self._around.config.placement
        return choose_blocks(machine, others, num_blocks, rule=rule, rng=rng)
