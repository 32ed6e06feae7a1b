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
from shoal.client.swarm.audit_book import AuditBook, Evidence
from shoal.client.swarm.broken_pairs import PushRules
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.directory_cache import DirectoryCache, Holding, holding
from shoal.client.swarm.in_flight import PeerInFlight
from shoal.client.swarm.measurements import Measurements
from shoal.client.swarm.peer_health import PeerHealth
from shoal.client.swarm.server_probe import ServerProbe
from shoal.client.swarm.waits import Outage, Waits
from shoal.concurrency import now
from shoal.errors import (
    Misrouted,
    MissingBlocks,
    PeerError,
    ServerBusy,
    ServerLate,
    ServerLost,
    ServerMoved,
    UnsupportedOperation,
)
from shoal.ledgers.tabs import Tabs
from shoal.model.weights.disk_cache import cache_folder
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.audits.audit_budget import RATES
from shoal.policy.routing.route import Hop, Needs, Route, choose_route, price_route
from shoal.policy.view import SwarmView, format_blocks
from shoal.policy.waiting import LOOK_SECONDS, MissingSince
from shoal.prefix import DrawnSalt
from shoal.spans import Span

__all__ = ["Holding", "Swarm", "holding"]

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_SECONDS = 1.0
"""How long to wait for servers that hold the blocks, and did not answer, if none is blocked."""
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
        self.push_rules = PushRules(self.measurements.broken_pairs, config.wire, config.packs)
        self.adapter_sync = AdapterSync()
        audit_rng = random.Random(random.getrandbits(64))  # noqa: S311 - no server sees anything of it
        evidence_folder = config.evidence_folder or cache_folder() / "shut-out"
        self.audits = AuditBook(RATES[config.audits], folder=evidence_folder, rng=audit_rng)
        self.node = node
        """This client's access to the network."""
        self.tabs: Tabs | None = None
        self._directory = DirectoryCache(
            node, model, fingerprint, config, self.measurements.round_trips, unix_time=unix_time
        )
        self._probe = ServerProbe(
            node.transport, self.measurements, seconds=config.measure_seconds, patience=config.patience_seconds
        )
        self._health = PeerHealth(clock=now)
        self._in_flight: dict[str, PeerInFlight] = {}  # by peer
        self._head_is_offered = True
        self._waits = Waits(model.name, self.events)
        self._rng = rng or random.Random(random.getrandbits(32))  # noqa: S311 - nothing secret

    # -- routes -------------------------------------------------------------------------------------------------------

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

        With `rather_confirmed`, or for a session while the client is wary, it goes through servers only that have
        computed steps for this client, if they suffice.

        The span may be a part of a ring, between the servers `upstream` and `downstream` of it. Servers that hold a
        block alone need not have answered. A head that is needed is dropped from the needs if no server offers one.

        Raises `MissingBlocks`, `UnsupportedOperation` if all servers of a block refuse single passes, and `SwarmError`
        if the directory has never answered.
        """
        view = self._confirmed(excluded, needs)
        if not (rather_confirmed or (needs.session and self._health.is_wary)) or view.missing(span):
            view = await self._proven(span, excluded, needs)
        self.measurements.believe(view.servers)
        route = choose_route(
            view,
            span,
            needs=replace(needs, head=needs.head and self._has_head(view)),
            known=self.measurements.measured(),
            upstream=upstream,
            downstream=downstream,
            chooser=self.config.chooser,
            rng=self._rng,
        )
        chosen = tuple((hop.server.peer, hop.span) for hop in route.hops)
        self.events.emit(events.RouteChosen(self.model.name, span, chosen, route.seconds, route.explain))
        return route

    async def _proven(self, span: Span, excluded: Set[Holding], needs: Needs) -> SwarmView:
        """The servers that a route over a span may use. The directory is read if it is old, and some are pinged."""
        await self._directory.ensure_fresh()
        view = self._healthy(excluded, needs)
        if missing := view.missing(span):
            await self._directory.refresh(missing)
            view = self._healthy(excluded, needs)
        view = await self._answering(view, span, needs)
        if view.missing(span):  # rather a server that failed lately than none
            view = await self._answering(self._not_blocked(excluded, needs), span, needs)
            self._check_offered(span, needs)
        return view

    def _confirmed(self, excluded: Set[Holding], needs: Needs) -> SwarmView:
        """The healthy servers that have computed steps for this client."""
        return self._healthy(excluded, needs).only(lambda server: self.measurements.is_confirmed(server.peer))

    async def _answering(self, view: SwarmView, span: Span, needs: Needs) -> SwarmView:
        """The same view with those servers only that a route may use, after some were pinged."""
        if view.missing(span):
            return view
        return await self._probe.answering(
            view,
            span,
            needs,
            everyone=self._directory.usable(),
            version=self._directory.version,
            known=self.measurements.measured(),
        )

    async def check_held(self, span: Span, excluded: Set[Holding], needs: Needs) -> None:
        """Raises `MissingBlocks` if no other servers are known that hold these blocks. The directory is not asked again
        because of that, as `route` does it."""
        await self._directory.ensure_fresh()
        if missing := self._not_blocked(excluded, needs).missing(span):
            raise MissingBlocks(f"no other server holds blocks {format_blocks(missing)}", blocks=missing)

    def _check_offered(self, span: Span, needs: Needs) -> None:
        """Raises `UnsupportedOperation` if the servers of some block all refuse single passes, which are needed."""
        usable = self._directory.usable()
        training = usable.only(lambda server: server.training)
        if not needs.session and not usable.missing(span) and (blocks := training.missing(span)):
            raise UnsupportedOperation(
                f"blocks {format_blocks(blocks)} are served for generating only",
                hint="servers that were started with --no-training offer no forward and backward passes",
            )

    def _has_head(self, view: SwarmView) -> bool:
        """Whether a server of this view offers the output head. The log says when no healthy one does any more."""
        last = view.num_blocks - 1
        found = view.offers_head(last)
        offered = found or self._healthy(frozenset()).offers_head(last)
        if offered != self._head_is_offered:
            self._head_is_offered = offered
            if offered:
                log.info("servers compute the output head")
            else:
                log.warning("no server offers the output head: this client computes it")
        return found

    def _not_blocked(self, excluded: Set[Holding], needs: Needs | None = None) -> SwarmView:
        """The servers that may be asked now for what is needed: not blocked, not excluded, not refusing training."""
        return self._directory.usable().only(
            lambda each: (
                holding(each) not in excluded
                and not self.audits.is_liar(each.peer)
                and not self._health.blocked(each.peer)
                and (each.training or needs is None or needs.session)
            )
        )

    def _healthy(self, excluded: Set[Holding], needs: Needs | None = None) -> SwarmView:
        """Of these, the servers that are not deprioritized: they have not failed lately."""
        return self._not_blocked(excluded, needs).only(lambda server: not self._health.deprioritized(server.peer))

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
                    self.blame(lost, since=began)
                except (ServerBusy, ServerLate) as unready:
                    log.info("%s", unready)
                    self.blame(unready)
                except Misrouted as misrouted:
                    log.info("%s", misrouted)
                    self.blame(misrouted)
                    holdings = self._directory.holdings(misrouted.peer)
                    excluded |= holdings
                    if isinstance(misrouted, ServerMoved):
                        moved |= holdings
                    self._directory.expire()  # the server may hold other blocks by now
                except MissingBlocks as missing:
                    outage = self._outage(span, excluded, moved, missing.blocks)
                    missing_since = missing_since.also(outage.blocks, now=now())
                    waited = missing_since.seconds(outage.blocks, now=now())
                    left = (patience if at_most is None else min(patience, at_most)) - waited
                    if left < SHORTEST_WAIT:
                        raise outage.error_after(waited) from None
                    if at_most is None:
                        tell(outage, waited, patience)
                    await asyncio.sleep(min(outage.look_seconds, left))

    def _outage(self, span: Span, excluded: Set[Holding], moved: Set[Holding], blocks: Sequence[int]) -> Outage:
        """Why no server computes some `blocks` of a span now. Raises `MissingBlocks` if waiting is in vain.

        It is not if servers have `moved`, and the directory does not know it yet.
        """
        loading = self._directory.loading()
        for server in loading.servers:
            if server.state is ServerState.JOINING:  # it has started again: what it failed before is past
                self._health.record_success(server.peer)
        retry = min(self._health.seconds_left() or RETRY_SECONDS, LOOK_SECONDS)
        if (error := self._directory.error) is not None:  # then the servers are not known
            return Outage(tuple(span), error, "it is asked again", look_seconds=retry)
        usable = self._directory.usable()
        if missing := usable.missing(span):
            return self._directory.outage(missing)
        refusing = usable.only(lambda server: holding(server) not in excluded - moved).missing(span)
        exhausted = self._exhausted(self._not_blocked(excluded).missing(span) or blocks)
        if not {*refusing}.isdisjoint(loading.missing(span)):  # they will not do it later either
            raise exhausted from None
        return Outage(exhausted.blocks, exhausted, "they are asked again", look_seconds=retry)

    def _exhausted(self, blocks: Sequence[int]) -> MissingBlocks:
        reasons = "; ".join((*self._health.reasons(), *self._probe.reasons()))
        return MissingBlocks(f"no server for blocks {format_blocks(blocks)} answers: {reasons}", blocks=blocks)

    async def connect(self, server: ServerInfo) -> Connection:
        """A new connection to a server, which the caller has to close. Raises `ServerLost`."""
        on_round_trip = functools.partial(self.measurements.record_round_trip, server.peer)
        in_flight = self._in_flight.setdefault(server.peer, PeerInFlight())
        tab = None if self.tabs is None else self.tabs.open(server.peer)
        return await Connection.open(
            self.node.transport, server, self.config, in_flight=in_flight, on_round_trip=on_round_trip, tab=tab
        )

    def blame(self, error: PeerError, *, since: float | None = None) -> None:
        """Keep away from a server that failed a request which began at the time `since`, now by default."""
        self._health.record_error(error, since=now() if since is None else since)
        if not isinstance(error, ServerBusy | ServerLate | Misrouted):
            self._probe.record_failure(error.peer)

    def holdings(self, peers: Set[str]) -> set[Holding]:
        """What these peers announce to hold."""
        return {each for peer in peers for each in self._directory.holdings(peer)}

    def shut_out(self, evidence: Evidence) -> None:
        """Use a server no more: it was found lying."""
        self.audits.shut_out(evidence)

    def permit(self, allowed: frozenset[str] | None, blocked: frozenset[str]) -> None:
        """From now on, routes go through `allowed` servers only (None: all), and not through `blocked` ones."""
        self.config = replace(self.config, allowed_servers=allowed, blocked_servers=blocked)
        self._directory.permit(self.config)

    def record_answer(self, hop: Hop, took: Iterable[tuple[int, float]] = (), *, waited: float | None = None) -> None:
        """A server did its work: its failures are forgotten.

        `took` are pairs of a number of tokens and the seconds that the server says it took for them. They correct the
        speeds that it announces. The client has `waited` for the first of them, if it knows.
        """
        peer = hop.server.peer
        self._health.record_success(peer)
        self._probe.record_answer(peer)
        for num_tokens, said in took:
            self.measurements.record_answer(hop, num_tokens, said, waited=waited)
            waited = None

    def record_overtaken(self, hop: Hop, seconds: float) -> None:
        """A server has not computed a step in `seconds`, and another one has. Once is no reason to avoid it.

        It is if the server has never computed any for this client.
        """
        peer, reason = hop.server.peer, f"gave nothing for {seconds:.1f} s, and others were faster"
        log.info("%s gave nothing for %.1f s: another server takes its place", peer, seconds)
        self._health.record_overtaken(peer, reason, is_proven=self.measurements.is_confirmed(peer))

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

    async def dtype(self, *, own: str) -> str | None:
        """The dtype that the swarm computes in; None if it has no server yet. `own` is the model's dtype.

        Raises `SwarmError` if the directory has never answered.
        """
        await self._directory.ensure_fresh()
        return self._directory.dtype(own=own)

    async def everybody(self) -> SwarmView:
        """All servers of this model that the directory has, whatever they do at present."""
        await self._directory.ensure_fresh()
        return self._directory.everybody()

    async def present(self) -> SwarmView:
        """The servers that can be used now, as far as this client knows: without those that it has found dead."""
        await self._directory.ensure_fresh()
        return self._healthy(frozenset(), Needs())

    async def num_servers(self, span: Span) -> int:
        """How many servers share single passes on the blocks of a span.

        Raises `SwarmError` if the directory has never answered.
        """
        await self._directory.ensure_fresh()
        healthy = self._healthy(frozenset(), Needs(session=False)).servers
        return sum(server.span.start < span.end and span.start < server.span.end for server in healthy)

    def others(self, server: ServerInfo) -> SwarmView:
        """The other servers, without those that have failed lately. They need not have answered."""
        return self._healthy({holding(server)})

    def is_avoided(self, peer: str) -> bool:
        """Whether a server has failed lately, said that it is busy, or was found lying."""
        return self._health.deprioritized(peer) or self._health.blocked(peer) or self.audits.is_liar(peer)

    def is_lost(self, peer: str) -> bool:
        """Whether a server has failed, and has not answered or announced itself since. A busy one is not lost."""
        return self._health.lost(peer)

    def is_usable(self, server: ServerInfo) -> bool:
        """Whether a server has this client's weights, and the user permits it."""
        return self._directory.is_usable(server)
