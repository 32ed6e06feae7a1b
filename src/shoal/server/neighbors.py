"""The round-trip times from a server to the servers that can come before or after it in a route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Set

from shoal.concurrency import background
from shoal.errors import SwarmError
from shoal.net.ping import distances
from shoal.net.transport import Node
from shoal.peers import MAX_NEIGHBORS, ModelInfo, ServerInfo, short
from shoal.policy.dtypes import mixture
from shoal.policy.routing.latency import RoundTrips
from shoal.policy.view import SwarmView

log = logging.getLogger(__name__)

EXPLORED = 4
"""How many of the `MAX_NEIGHBORS` servers of a round are not the nearest known ones: there may be nearer servers."""


def may_be_next(server: ServerInfo, other: ServerInfo) -> bool:
    """Whether a route can go from one of two servers to the other and gets further by it: with the same weights."""
    one, two = server.span, other.span
    follows = one.start < two.start <= one.end < two.end
    precedes = two.start < one.start <= two.end < one.end
    return (follows or precedes) and server.fingerprint == other.fingerprint


def choose_neighbors(
    view: SwarmView,
    server: ServerInfo,
    known: Mapping[str, float],
    rng: random.Random,
    silent: Set[str] = frozenset(),
) -> tuple[ServerInfo, ...]:
    """At most `MAX_NEIGHBORS` servers whose distance is measured now: the nearest known ones, and some others.

    `known` are round trips in seconds by peer id, and `silent` the peers that did not answer. `rng` decides between
    servers about which the same is known.
    """
    others = [each for each in view.online().servers if each.peer != server.peer and may_be_next(server, each)]
    rng.shuffle(others)
    others.sort(key=lambda each: known.get(each.peer, float("inf")))
    nearest = [each for each in others if each.peer in known][: MAX_NEIGHBORS - EXPLORED]
    rest = [each for each in others if each not in nearest]
    # First those never measured, then those that were far, and last those that did not answer.
    rest.sort(key=lambda each: (each.peer in silent, each.peer in known))
    return (*nearest, *rest[: MAX_NEIGHBORS - len(nearest)])


class NeighborMonitor:
    """Measures the round trips to a server's neighbors, one round every `every_seconds` seconds.

    `round_trips` is what the server announces: the short peer ids and seconds of the nearest `MAX_NEIGHBORS`.
    `on_new` is called when a round adds a neighbor to them.
    """

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        server: ServerInfo,
        *,
        every_seconds: float,
        on_new: Callable[[], None] = lambda: None,
    ) -> None:
        self.round_trips: tuple[tuple[str, float], ...] = ()
        self._node = node
        self._model = model
        self._server = server
        self._every_seconds = every_seconds
        self._on_new = on_new
        self._known = RoundTrips(asyncio.get_running_loop().time)
        self._mixture: str | None = None
        self._silent: set[str] = set()  # peers that did not answer
        self._rng = random.Random()  # noqa: S311 - nothing secret

    def measuring(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Measure rounds until the context is left."""
        return background(self._measure_rounds(), name="shoal-neighbors")

    async def _measure_rounds(self) -> None:
        while True:
            try:
                await self.measure()
            except SwarmError as failure:  # the next round tries again
                log.debug("the directory did not name the neighbors: %s", failure)
            await asyncio.sleep(self._every_seconds)

    async def measure(self) -> None:
        """Measure one round. Raises `SwarmError` if the directory does not answer."""
        view = SwarmView(self._model.num_blocks, await self._node.directory.servers(self._model))
        self._warn_of_mixture(view)
        for peer in self._known.picture().round_trips.keys() - {server.peer for server in view.online().servers}:
            self._known.forget(peer)
        self._silent &= {server.peer for server in view.servers}
        chosen = choose_neighbors(view, self._server, self._known.picture().round_trips, self._rng, self._silent)
        for peer, seconds in (await distances(self._node.transport, chosen)).items():
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
            self._on_new()

    def _warn_of_mixture(self, view: SwarmView) -> None:
        """Log which servers of these weights compute in which dtype, if they differ, and again when that changes."""
        others = view.only(lambda each: each.peer != self._server.peer and each.fingerprint == self._server.fingerprint)
        found = mixture([*others.servers, self._server])
        if found is not None and found != self._mixture:
            log.warning("servers of this model compute differently: %s", found)
        self._mixture = found
