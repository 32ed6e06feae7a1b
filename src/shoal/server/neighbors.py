"""The round-trip times from a server to the servers that can come before or after it in a route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

from shoal.concurrency import background
from shoal.errors import SwarmError
from shoal.net.ping import measure_round_trips
from shoal.net.transport import Node
from shoal.peers import MAX_NEIGHBORS, ModelInfo, ServerInfo, short
from shoal.policy.dtypes import mixture
from shoal.policy.nearest import choose_neighbors
from shoal.policy.routing.latency import average_round_trip
from shoal.policy.view import SwarmView

log = logging.getLogger(__name__)


class NeighborMonitor:
    """Measures the round trips to a server's neighbors, one round every `every_seconds` seconds.

    `round_trips` is what the server announces: the short peer ids and seconds of the nearest `MAX_NEIGHBORS`.
    `on_new` is called when a round adds a neighbor to them. `servers` are all other servers that are online, nearest
    first.
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
        self.servers: tuple[ServerInfo, ...] = ()
        self._node = node
        self._model = model
        self._server = server
        self._every_seconds = every_seconds
        self._on_new = on_new
        self._known: dict[str, float] = {}  # round trips in seconds, by peer id
        self._mixture: str | None = None
        self._silent: set[str] = set()  # peers that did not answer
        self._rng = random.Random(random.getrandbits(32))  # noqa: S311 - nothing secret; tests seed the module

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
        for peer in self._known.keys() - {server.peer for server in view.online().servers}:
            del self._known[peer]
        self._silent &= {server.peer for server in view.servers}
        chosen = choose_neighbors(view, self._server, self._known, self._rng, self._silent)
        for peer, seconds in (await measure_round_trips(self._node.transport, chosen)).items():
            if seconds is None:
                self._known.pop(peer, None)
                self._silent.add(peer)
            else:
                self._silent.discard(peer)
                self._known[peer] = average_round_trip(self._known.get(peer), seconds)
        others = [each for each in view.online().servers if each.peer != self._server.peer]
        self._rng.shuffle(others)
        self.servers = tuple(sorted(others, key=lambda each: self._known.get(each.peer, float("inf"))))
        known = self._known
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
