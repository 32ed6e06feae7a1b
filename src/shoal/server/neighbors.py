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
from shoal.policy.nearest import choose_neighbors, may_be_next
from shoal.policy.routing.latency import average_round_trip
from shoal.policy.view import SwarmView

log = logging.getLogger(__name__)


class NeighborMonitor:
    """Measures the round trips to a server's neighbors, one round every `every_seconds` seconds.

    `round_trips` is what the server announces: the short peer ids and seconds of the nearest `MAX_NEIGHBORS`;
    `unreached` are the short ids of those that are online and did not answer it.
    `servers` are all other servers that are online, the nearest first. `describe` says what the server is at present.
    `on_new` is called when a round adds a neighbor, and `on_view` with each view of the swarm that is read.
    """

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        describe: Callable[[], ServerInfo],
        *,
        every_seconds: float,
        on_new: Callable[[], None] = lambda: None,
        on_view: Callable[[SwarmView], None] = lambda view: None,
    ) -> None:
        self.round_trips: tuple[tuple[str, float], ...] = ()
        self.unreached: tuple[str, ...] = ()
        self.servers: tuple[ServerInfo, ...] = ()
        self._node = node
        self._model = model
        self._describe = describe
        self._every_seconds = every_seconds
        self._on_new = on_new
        self._on_view = on_view
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
        self._on_view(view)
        own = self._describe()
        self._warn_of_mixture(view, own)
        others = {server.peer for server in view.online().servers if may_be_next(own, server)}
        for peer in self._known.keys() - others:  # they left, or they or this server took other blocks
            del self._known[peer]
        self._silent &= {server.peer for server in view.servers}
        chosen = choose_neighbors(view, own, self._known, self._rng, self._silent)
        for peer, seconds in (await measure_round_trips(self._node.transport, chosen)).items():
            if seconds is None:
                self._known.pop(peer, None)
                self._silent.add(peer)
            else:
                self._silent.discard(peer)
                self._known[peer] = average_round_trip(self._known.get(peer), seconds)
        online = [each for each in view.online().servers if each.peer != own.peer]
        self._rng.shuffle(online)
        self.servers = tuple(sorted(online, key=lambda each: self._known.get(each.peer, float("inf"))))
        known = self._known
        self.unreached = tuple(sorted(short(peer) for peer in self._silent & others))[:MAX_NEIGHBORS]
        before = {peer for peer, _ in self.round_trips}
        self.round_trips = tuple((short(peer), known[peer]) for peer in sorted(known, key=known.__getitem__))[
            :MAX_NEIGHBORS
        ]
        if {peer for peer, _ in self.round_trips} - before:
            self._on_new()

    def _warn_of_mixture(self, view: SwarmView, own: ServerInfo) -> None:
        """Log which servers of these weights compute in which dtype, if they differ, and again when that changes."""
        others = view.only(lambda each: each.peer != own.peer and each.fingerprint == own.fingerprint)
        found = mixture([*others.servers, own])
        if found is not None and found != self._mixture:
            log.warning("servers of this model compute differently: %s", found)
        self._mixture = found
