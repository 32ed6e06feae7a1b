"""Which servers of the swarm a client uses, in which order, and what happens when one fails.

`Swarm.with_failover` is the only retry loop of the client. What it retries keeps its progress: a pass that failed at
block 8 goes on at block 8, on another server.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from dataclasses import replace
from typing import TypeVar

from shoal import events
from shoal.client.history.history_store import HistoryStore
from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.adapter_sync import AdapterSync
from shoal.client.swarm.audit_book import AuditBook
from shoal.client.swarm.broken_pairs import PushRules
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.in_flight import PeerInFlight
from shoal.client.swarm.known.directory_cache import DirectoryCache, Holding
from shoal.client.swarm.known.known_servers import KnownServers
from shoal.client.swarm.known.server_probe import ServerProbe
from shoal.client.swarm.measurements import Measurements
from shoal.client.swarm.waits import Waits
from shoal.concurrency import now
from shoal.errors import Misrouted, MissingBlocks, ServerBusy, ServerLate, ServerLost, ServerMoved
from shoal.ledgers.tabs import Tabs
from shoal.model.weights.disk_cache import cache_folder
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.audits.audit_budget import RATES
from shoal.policy.routing.route import Hop, Needs, Route, choose_route, price_route
from shoal.policy.waiting import MissingSince
from shoal.prefix import DrawnSalt
from shoal.spans import Span

log = logging.getLogger(__name__)
T = TypeVar("T")

SHORTEST_WAIT = 1e-3
"""Patience that is shorter than this is over."""


class Swarm:
    """The servers of one model as one client sees them: routes over them, connections, and failover."""

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        fingerprint: str,
        config: ClientOptions,
        *,
        unix_time: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        observers: events.Observers | None = None,
    ) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.config = config
        self.salt = DrawnSalt.draw() if config.salt is None else config.salt
        """The salt of this client's prefixes. A secret one lets no other client find out what they are."""
        self.events = observers or events.Observers(config.observers)
        """What is told of this model's events, by default what the config names. It has to be closed."""
        self.store = HistoryStore(
            config.history_encoding, memory_bytes=config.history_memory, folder=config.history_folder
        )
        """Where the histories of all sessions are."""
        self.measurements = Measurements(now)
        self.adapter_sync = AdapterSync()
        audit_rng = random.Random(random.getrandbits(64))  # noqa: S311 - no server sees anything of it
        evidence_folder = config.evidence_folder or cache_folder() / "shut-out"
        self.audits = AuditBook(RATES[config.audits], folder=evidence_folder, rng=audit_rng)
        self.node = node
        """This client's access to the network."""
        self.tabs: Tabs | None = None
        self.servers = KnownServers(
            DirectoryCache(node, model, fingerprint, config, self.measurements.round_trips, unix_time=unix_time),
            ServerProbe(
                node.transport, self.measurements, seconds=config.measure_seconds, patience=config.patience_seconds
            ),
            self.measurements,
            self.audits,
        )
        self._in_flight: dict[str, PeerInFlight] = {}  # by peer
        self._waits = Waits(model.name, self.events)
        self._rng = rng or random.Random(random.getrandbits(32))  # noqa: S311 - nothing secret

    @property
    def push_rules(self) -> PushRules:
        """How servers push to each other for this client."""
        return PushRules(self.measurements.broken_pairs, self.config.wire, self.config.packs)

    async def route(
        self,
        span: Span,
        excluded: Set[Holding] = frozenset(),
        *,
        needs: Needs,
        upstream: ServerInfo | None = None,
        downstream: ServerInfo | None = None,
        rather_confirmed: bool = False,
    ) -> Route:
        """The fastest route over a span through servers that may be used and have answered this client.

        With `rather_confirmed`, or while the client is wary, it goes through servers only that have computed for this
        client, where there are any.

        The span may be a part of a ring, between the servers `upstream` and `downstream` of it. Servers that hold a
        block alone need not have answered. A head that is needed is dropped from the needs if no server offers one.

        Raises `MissingBlocks`, `UnsupportedOperation` if all servers of a block refuse single passes, and `SwarmError`
        if the directory has never answered.
        """
        view = await self.servers.proven(span, excluded, needs, rather_confirmed=rather_confirmed)
        self.measurements.believe(view.servers)
        route = choose_route(
            view,
            span,
            needs=replace(needs, head=needs.head and self.servers.has_head(view)),
            known=self.measurements.measured(),
            upstream=upstream,
            downstream=downstream,
            chooser=self.config.chooser,
            rng=self._rng,
        )
        chosen = tuple((hop.server.peer, hop.span) for hop in route.hops)
        self.events.emit(events.RouteChosen(self.model.name, span, chosen, route.seconds, route.explain))
        return route

    async def route_of_others(
        self,
        span: Span,
        peers: Set[str],
        excluded: Set[Holding] = frozenset(),
        *,
        needs: Needs,
        rather_confirmed: bool = False,
    ) -> Route:
        """A route over servers other than these `peers`. Raises as `route` does."""
        excluded = excluded | self.servers.holdings(peers)
        route = await self.route(span, excluded, needs=needs, rather_confirmed=rather_confirmed)
        if not peers.isdisjoint(hop.server.peer for hop in route.hops):  # they have announced other blocks meanwhile
            raise MissingBlocks(f"no other server holds blocks {span}", blocks=tuple(span))
        return route

    async def with_failover(
        self, span: Span, act: Callable[[Set[Holding]], Awaitable[T]], *, at_most: float | None = None
    ) -> T:
        """Call `act` until it succeeds, and after each failure keep away from the server that failed.

        `act` is given the servers that cannot do this with the blocks that they hold now. While no server computes some
        blocks, the call waits: for the client's patience, or for `at_most` seconds if that is less and no caller waits.
        Then it raises `MissingBlocks`; at once if waiting is in vain, because no server that the client may use has
        ever held or announced these blocks, or the user's own choice of servers excludes those that hold them.
        """
        patience = self.config.patience_seconds
        excluded: set[Holding] = set()
        moved: set[Holding] = set()  # of these, those that will not be announced any more
        missing_since = MissingSince()
        with self._waits.of_call() as tell:
            while True:
                began = now()
                try:
                    return await act(excluded)
                except ServerLost as lost:
                    self.events.emit(events.ServerLost(lost.peer, str(lost)))
                    self.servers.blame(lost, since=began)
                except (ServerBusy, ServerLate) as unready:
                    log.info("%s", unready)
                    self.servers.blame(unready)
                except Misrouted as misrouted:
                    log.info("%s", misrouted)
                    self.servers.blame(misrouted)
                    holdings = self.servers.misrouted(misrouted.peer)
                    excluded |= holdings
                    if isinstance(misrouted, ServerMoved):
                        moved |= holdings
                except MissingBlocks as missing:
                    outage = self.servers.outage(span, excluded, moved, missing.blocks)
                    missing_since = missing_since.also(outage.blocks, now=now())
                    waited = missing_since.seconds(outage.blocks, now=now())
                    left = (patience if at_most is None else min(patience, at_most)) - waited
                    if left < SHORTEST_WAIT:
                        raise outage.error_after(waited) from None
                    if at_most is None:
                        tell(outage, waited, patience)
                    await asyncio.sleep(min(outage.look_seconds, left))

    async def connect(self, server: ServerInfo) -> Connection:
        """A new connection to a server, which the caller has to close. Raises `ServerLost`."""
        on_round_trip = functools.partial(self.measurements.record_round_trip, server.peer)
        in_flight = self._in_flight.setdefault(server.peer, PeerInFlight())
        tab = None if self.tabs is None else self.tabs.open(server.peer)
        return await Connection.open(
            self.node.transport, server, self.config, in_flight=in_flight, on_round_trip=on_round_trip, tab=tab
        )

    def permit(self, allowed: frozenset[str] | None, blocked: frozenset[str]) -> None:
        """From now on, routes go through `allowed` servers only (None: all), and not through `blocked` ones."""
        self.config = replace(self.config, allowed_servers=allowed, blocked_servers=blocked)
        self.servers.permit(self.config)

    def record_answer(self, hop: Hop, took: Iterable[tuple[int, float]] = (), *, waited: float | None = None) -> None:
        """A server did its work: its failures are forgotten.

        `took` are pairs of a number of tokens and the seconds that the server says it took for them. They correct the
        speeds that it announces. The client has `waited` for the first of them, if it knows.
        """
        self.servers.record_answer(hop.server.peer)
        for num_tokens, said in took:
            self.measurements.record_answer(hop, num_tokens, said, waited=waited)
            waited = None

    def price(
        self,
        hops: Sequence[Hop],
        *,
        needs: Needs,
        upstream: ServerInfo | None = None,
        downstream: ServerInfo | None = None,
    ) -> Route:
        """What a step costs on hops where a session is open already."""
        needs = replace(needs, needed_tokens=0)
        known = self.measurements.measured()
        return price_route(hops, needs=needs, known=known, upstream=upstream, downstream=downstream)
