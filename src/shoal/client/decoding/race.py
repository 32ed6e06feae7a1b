"""Second servers for a step that is late: the first answer counts.

A server that answers pings and says that it works may give nothing for as long as it likes. So a step that is late
(`shoal.policy.lateness`) is computed by another server too, while the first is still waited for. That one begins with
nothing, as one that replaces a lost server does: it computes the history of the stage, which both have.

    late stage       0 ······························ position ─── late step ──▶ ?
    second server    0 ══════ computes the history ══════════════ late step ──▶ its outputs

If the late server answers first, the second one is let go. Otherwise the second takes its place in the ring, with what
it has computed, and the late one is let go. It is not blamed for that, except if it happens again.

If the second server is late too, there may be many of the kind. Then others are tried (`wait_for_others`), and the next
one is among those that compute anything at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from shoal.client.decoding.outputs import beside
from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.stage import Stage
from shoal.client.decoding.standby import compute_beside
from shoal.client.swarm.known.directory_cache import Holding, holding
from shoal.client.swarm.swarm import Swarm
from shoal.client.swarm.trials import wait_for_others
from shoal.concurrency import done_although_cancelled, now
from shoal.errors import CannotRewind, PeerError, SwarmError
from shoal.policy.lateness import MOST_TRIED, PATIENT_AFTER, Awaited

log = logging.getLogger(__name__)

TRIAL_SECONDS = 2.0
"""How long others are tried. After that, the next one is chosen among all."""
RETRY_SECONDS = 3.0
"""How soon other servers are sought again if there was none."""


@dataclass(eq=False)
class Second:
    """Other servers in the place of a late one: `pipeline` is theirs, once they were chosen.

    `tried` are the servers that were chosen. The `task` ends when they have computed the step or have failed.
    """

    began_at: float
    pipeline: Pipeline | None = None
    tried: frozenset[Holding] = frozenset()
    has_won: bool = False
    is_alone: bool = False
    """Whether there are no other servers."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def hopeful_until(self) -> float:
        """Until when no other servers are asked, if nothing happens."""
        if self.is_alone:
            return self.began_at + RETRY_SECONDS
        if self.task is not None and self.task.done():
            return float("-inf")
        owed = () if self.pipeline is None else self.pipeline.awaited.values()
        return min((awaited.late_at() for awaited in owed), default=float("inf"))

    async def close(self) -> None:
        """Let go of the servers, except if they have taken the late one's place."""
        try:
            if self.task is not None:
                self.task.cancel()
                await asyncio.gather(self.task, return_exceptions=True)
        finally:
            if self.pipeline is not None:
                await self.pipeline.disconnect()


class Race:
    """The second servers of a session, for one late step at a time. `notify` is called when one of them is over."""

    def __init__(self, swarm: Swarm, planner: RoutePlanner, notify: Callable[[], None]) -> None:
        self._swarm = swarm
        self._planner = planner
        self._notify = notify
        self._late: Stage | None = None
        self._awaited: Awaited | None = None
        self._position = 0  # where the late step ends
        self._seconds: list[Second] = []
        self._num_late: WeakKeyDictionary[Stage, int] = WeakKeyDictionary()

    def look_at(self, pipeline: Pipeline) -> float | None:
        """When `run` has something to do next, if no server answers before."""
        times = [self._late_at(stage, awaited) for stage, awaited in pipeline.awaited.items()]
        times += [second.hopeful_until() for second in self._seconds]
        return min((each for each in times if now() < each < float("inf")), default=None)

    def _late_at(self, stage: Stage, awaited: Awaited) -> float:
        return awaited.late_at(num_late=self._num_late.get(stage, 0))

    async def run(self, pipeline: Pipeline, excluded: Set[Holding]) -> bool:
        """Start second servers that are due, end a race that is over; returns whether one has changed the ring."""
        if self._late is not None and pipeline.awaited.get(self._late) != self._awaited:
            await self._end(pipeline)
        if (winner := next((each for each in self._seconds if each.has_won), None)) is not None:
            await self._take_over(pipeline, winner)
            return True
        self._start_if_due(pipeline, excluded)
        return False

    async def stop(self) -> None:
        """Let go of all second servers."""
        self._late = self._awaited = None
        seconds, self._seconds = self._seconds, []
        await done_although_cancelled(*(second.close() for second in seconds))

    async def _end(self, pipeline: Pipeline) -> None:
        """The late server has answered first, or is out of the race for another reason, such as a failure."""
        late = self._late
        assert late is not None
        found_others = any(each.pipeline is not None for each in self._seconds)
        await self.stop()
        if late.progress.num_computed >= self._position:
            self._num_late[late] = self._num_late.get(late, 0) + 1
            if found_others and self._num_late[late] >= PATIENT_AFTER:
                log.info("%s was late %d times: leaving it", late.peer, self._num_late[late])
                late.leave()

    async def _take_over(self, pipeline: Pipeline, winner: Second) -> None:
        late, awaited = self._late, self._awaited
        assert late is not None
        assert awaited is not None
        assert winner.pipeline is not None
        self._swarm.servers.record_overtaken(late.peer, now() - awaited.since)
        pipeline.overtake(late, winner.pipeline)
        winner.pipeline = None
        await done_although_cancelled(self.stop(), late.disconnect(goodbye=False))

    def _start_if_due(self, pipeline: Pipeline, excluded: Set[Holding]) -> None:
        """Ask other servers for a step that is late, if all that were asked before are late too, or have failed."""
        if self._late is None:
            self._awaited = None
            for stage, awaited in pipeline.awaited.items():
                if stage.is_open and self._late_at(stage, awaited) <= now():
                    log.info("%s is late: asking another server too", stage.peer)
                    self._late, self._awaited, self._position = stage, awaited, stage.progress.pending[0].end
                    break
        is_hopeful = any(now() < each.hopeful_until() for each in self._seconds)
        if self._late is None or is_hopeful or len(self._seconds) >= MOST_TRIED:
            return
        tried = frozenset[Holding]().union(*(each.tried for each in self._seconds))
        second = Second(now())
        second.task = asyncio.create_task(self._compute(second, pipeline, self._late, excluded, tried))
        self._seconds.append(second)

    async def _compute(
        self, second: Second, pipeline: Pipeline, late: Stage, excluded: Set[Holding], tried: Set[Holding]
    ) -> None:
        """Let other servers compute all of a stage, up to the late step. The `tried` ones were asked in vain."""
        news, num_tokens = asyncio.Event(), self._position
        try:
            if tried:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TRIAL_SECONDS):
                        like = late.history.between(num_tokens - 1, num_tokens)
                        await wait_for_others(self._swarm, late.hop.server, late.hop.span, like)
            excluded = {holding(late.hop.server), *tried, *excluded}
            route = await self._planner.replacement(late, pipeline, excluded, rather_confirmed=True)
            second.tried = frozenset(holding(hop.server) for hop in route.hops)
            second.pipeline = others = self._planner.pipeline(route, late.history, news.set)
            sink = pipeline.sink(pipeline.stages.index(late))
            others.outputs = beside(sink)
            others.logits_request = pipeline.logits_request if sink is pipeline.outputs else None
            await compute_beside(others, num_tokens, news, asked=self._notify)
            second.has_won = True
        except PeerError as failure:
            log.info("%s", failure)
            if not isinstance(failure, CannotRewind):  # that is no fault of the server
                self._swarm.servers.blame(failure)
        except SwarmError as failure:  # there are no other servers
            log.info("%s", failure)
            second.is_alone = True
        asyncio.get_running_loop().call_soon(self._notify)  # once the task is done
