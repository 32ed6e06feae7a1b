"""How far a server is from those that may come before or after it in a route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Set

from shoal.errors import SwarmError
from shoal.net.ping import measure_round_trips
from shoal.net.transport import Node
from shoal.peers import MAX_NEIGHBORS, ModelInfo, ServerInfo, short
from shoal.policy.dtypes import mixture
from shoal.policy.routing.latency import RoundTrips
from shoal.policy.view import SwarmView

log = logging.getLogger(__name__)

STRANGERS = 4
"""So many of those that are measured in a round are others than the nearest so far: there may be nearer ones."""


def may_be_next(server: ServerInfo, other: ServerInfo) -> bool:
    """Whether a route can go from one of them to the other, and gets further by it."""
    one, two = server.span, other.span
    follows = one.start < two.start <= one.end < two.end
    precedes = two.start < one.start <= two.end < one.end
    return (follows or precedes) and server.fingerprint == other.fingerprint


def choose_neighbors(
    view: SwarmView,
    server: ServerInfo,
    known: Mapping[str, float],
    chance: random.Random,
    silent: Set[str] = frozenset(),
) -> tuple[ServerInfo, ...]:
    """Those whose distance is to be measured now: the nearest that are known, and some strangers."""
    others = [each for each in view.online().servers if each.peer != server.peer and may_be_next(server, each)]
    chance.shuffle(others)
    others.sort(key=lambda each: known.get(each.peer, float("inf")))
    nearest = [each for each in others if each.peer in known][: MAX_NEIGHBORS - STRANGERS]
    strangers = [each for each in others if each not in nearest]
    # Who was measured and was far comes back when all others have been tried, and last who did not answer.
    strangers.sort(key=lambda each: (each.peer in silent, each.peer in known))
    return (*nearest, *strangers[: MAX_NEIGHBORS - len(nearest)])


class NeighborMonitor:
    """Measures them again and again; `round_trips` is what a server announces of them."""

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        server: ServerInfo,
        *,
        every_seconds: float,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.round_trips: tuple[tuple[str, float], ...] = ()
        self._node = node
        self._model = model
        self._server = server
        self._every_seconds = every_seconds
        self._changed = changed
        self._known = RoundTrips(asyncio.get_running_loop().time)
        self._mixture: str | None = None
        self._silent: set[str] = set()  # those that were asked in vain
        self._chance = random.Random()  # noqa: S311 - nothing secret

    @contextlib.asynccontextmanager
    async def measuring(self) -> AsyncIterator[None]:
        """From now on and until the context is left, beside everything else."""
        task = asyncio.create_task(self._measure_for_ever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _measure_for_ever(self) -> None:
        while True:
            try:
                await self.measure()
            except SwarmError as failure:  # the directory may be away for a while
                log.debug("the neighbours are not known: %s", failure)
            await asyncio.sleep(self._every_seconds)

    async def measure(self) -> None:
        """One round. Raises `SwarmError` if the directory does not answer."""
        view = SwarmView(self._model.num_blocks, await self._node.directory.servers(self._model))
        self._say_mixture(view)
        for peer in self._known.picture().round_trips.keys() - {server.peer for server in view.online().servers}:
            self._known.forget(peer)
        self._silent &= {server.peer for server in view.servers}
        chosen = choose_neighbors(view, self._server, self._known.picture().round_trips, self._chance, self._silent)
        for peer, seconds in (await measure_round_trips(self._node.transport, chosen)).items():
            if seconds is None:
                self._known.forget(peer)
                self._silent.add(peer)
            else:
                self._silent.discard(peer)
                self._known.measured(peer, seconds)
        known = self._known.picture().round_trips
        before = {peer for peer, _ in self.round_trips}
        self.round_trips = tuple((short(peer), known[peer]) for peer in sorted(known, key=known.__getitem__))[
            :MAX_NEIGHBORS
        ]
        if {peer for peer, _ in self.round_trips} - before:
            self._changed()

    def _say_mixture(self, view: SwarmView) -> None:
        """Log who computes in what, if servers of our weights differ, and again when that has changed."""
        others = view.only(lambda each: each.peer != self._server.peer and each.fingerprint == self._server.fingerprint)
        found = mixture([*others.servers, self._server])
        if found is not None and found != self._mixture:
            log.warning("servers of this model compute differently: %s", found)
        self._mixture = found
