"""When a server goes to other blocks: it asks the shared plan at each view of the swarm, and claims before it goes.

`shoal.policy.placement.mover` decides. This loop brings it views, announces what it claims, and looks at the directory
once more before the server gives up its present blocks. In a swarm that is too large to be read whole, the views are
averages of all servers, and servers draw lots (`shoal.policy.placement.crowd`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from shoal.errors import SwarmError
from shoal.peers import ServerInfo, ServerState
from shoal.policy.claims import uncovered, yields_to
from shoal.policy.machines.fleet import is_quiet
from shoal.policy.machines.machine import Machine, machine_of
from shoal.policy.placement.crowd import crowd_plan
from shoal.policy.placement.joining import Placed
from shoal.policy.placement.mover import Mover
from shoal.policy.placement.plan import Move
from shoal.policy.view import format_blocks
from shoal.server.placing.swarm_watch import SwarmWatch
from shoal.spans import Span

log = logging.getLogger(__name__)

PLANNED_ASIDE = 64
"""From this many servers on, and in a quiet swarm, a plan is made on another thread: the event loop should not wait."""


@dataclass(frozen=True)
class OwnBlocks:
    """The server whose moves are found. `held` are its blocks, and `describe` says what it announces.

    `claim` announces that it wants other blocks, and returns whether the directory took that; `unclaim` takes it back.
    """

    held: Span
    describe: Callable[[], ServerInfo]
    claim: Callable[[Placed], Awaitable[bool]]
    unclaim: Callable[[], Awaitable[None]]

    def kept_for(self, wanted: Span, now: float) -> Span | None:
        """The blocks that it goes on serving if it goes to `wanted`."""
        return self.machine(now).keeps(wanted)

    def machine(self, now: float) -> Machine:
        """The server where it serves, whatever it claims."""
        serving = replace(self.describe(), span=self.held, state=ServerState.ONLINE, wants=None, ready_at=None)
        machine = machine_of(serving, now=now)
        assert machine is not None, "it is online"
        return machine


class MoveFinder:
    """Finds the next move of one server. `mover` is its state; `clock` is the Unix time."""

    def __init__(self, own: OwnBlocks, watch: SwarmWatch, mover: Mover, *, clock: Callable[[], float]) -> None:
        self.mover = mover
        self._planner = mover.planner
        self._own = own
        self._watch = watch
        self._clock = clock
        self._claimed: Span | None = None

    async def find(self) -> Move:
        """Wait until the server has to move. Its new blocks are claimed then, and it may leave the present ones."""
        while True:
            await self._watch.look(self._due)
            others = await self._others()
            now = self._clock()
            await self._plan((self._own.machine(now), *others), now)
            if (obstacle := await self._claim_anew()) is not None:
                await self._stay(obstacle)
            elif (move := self.mover.move) is not None:
                obstacle = await self._obstacle(move)
                if obstacle is None:
                    return move
                await self._stay(obstacle)

    @property
    def _due(self) -> float | None:
        """When the mover wants to look, by the event loop's clock; `None` if it does not mind."""
        seconds = self.mover.next_look_at - self._clock()
        return asyncio.get_running_loop().time() + max(0.0, seconds) if math.isfinite(seconds) else None

    async def _others(self) -> Sequence[Machine]:
        """The other servers as the mover has to see them: one by one, or as averages."""
        crowd = None
        with contextlib.suppress(SwarmError):  # the last look before a move notices that the directory does not answer
            crowd = await self._watch.crowd()
        if crowd is None:
            self.mover = replace(self.mover, planner=self._planner)
            return self._watch.machines(self._clock())
        self.mover = replace(self.mover, planner=partial(crowd_plan, self.mover.peer))
        now = self._clock()
        return [replace(average, up_since=now) for average in crowd]  # some have just come

    async def _plan(self, machines: Sequence[Machine], now: float) -> None:
        def plan() -> Mover:
            return self.mover.after_view(machines, now=now)

        is_short = len(machines) < PLANNED_ASIDE and not is_quiet(machines, now)
        self.mover = plan() if is_short else await asyncio.to_thread(plan)

    async def _claim_anew(self) -> str | None:
        """Announce what the mover claims now, if that is new. Returns what is in the way of that, if anything.

        Others do not count on a server that has claimed other blocks. So the last two holders of a block must not both
        claim others: each looks before it claims, and at once afterwards.
        """
        before, move = self._claimed, self.mover.intended
        if self.mover.claim == before:
            return None
        if self.mover.claim is None or move is None:
            self._claimed = None
            await self._own.unclaim()
            return None
        if (obstacle := await self._obstacle(move)) is not None:
            return obstacle
        self._claimed = self.mover.claim
        if not await self._own.claim(Placed(self._claimed, move.reason)):
            return "the directory does not take the claim"
        return await self._obstacle(move)

    async def _obstacle(self, move: Move) -> str | None:
        """Why the server should not go, by a last look at the directory; `None` if nothing is in the way."""
        try:
            others = await self._watch.read(move.fills)
        except SwarmError as failure:
            return str(failure)
        now = self._clock()
        if alone := uncovered(self._own.held, self._own.kept_for(move.after, now), self._watch.machines(now)):
            return f"no other server serves blocks {format_blocks(alone)}"
        if (other := yields_to(move.peer, move.fills, others)) is not None:
            return f"{other.name or other.peer} takes blocks {format_blocks(move.fills)}"
        return None

    async def _stay(self, why: str) -> None:
        log.info("the server stays with blocks %s: %s", self._own.held, why)
        self.mover = self.mover.failed(now=self._clock())
        if self._claimed is not None:
            self._claimed = None
            await self._own.unclaim()
