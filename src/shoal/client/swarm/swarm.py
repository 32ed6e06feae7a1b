"""The way through the swarm: which servers, in which order, and what happens when one fails.

`with_failover` is the only retry loop of the client. What it retries keeps its place: a walk that failed at block 8
goes on at block 8, by another server.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import TypeVar

import torch

from shoal import events
from shoal.client.history.history_store import HistoryStore
from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.adapter_sync import AdapterSync
from shoal.client.swarm.broken_pairs import BrokenPairs
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.directory_cache import DirectoryCache
from shoal.client.swarm.in_flight import PeerInFlight
from shoal.client.swarm.peer_health import PeerHealth
from shoal.client.swarm.server_probe import Meeting
from shoal.concurrency import now
from shoal.errors import Misrouted, MissingBlocks, PeerError, ServerBusy, ServerLost, UnsupportedOperation
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.routing.latency import RoundTrips
from shoal.policy.routing.route import Hop, Needs, Route, announced_seconds, choose_route, price_route
from shoal.policy.routing.spread import WorkInFlight
from shoal.policy.view import SwarmView, format_blocks
from shoal.spans import Span
from shoal.tensors import TensorName

log = logging.getLogger(__name__)
T = TypeVar("T")

Holding = tuple[str, Span, bool]
"""A peer and what it announces to hold, blocks and head: started again with others, it is another server."""


def holding(server: ServerInfo) -> Holding:
    return server.peer, server.span, server.head


def named_tensors(
    hidden: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
) -> dict[TensorName, torch.Tensor]:
    """The tensors of a message, without those that are absent."""
    tensors: dict[TensorName, torch.Tensor] = {"hidden": hidden}
    if positions is not None:
        tensors["positions"] = positions
    if mask is not None:
        tensors["mask"] = mask
    return tensors


class Swarm:
    """One model in the swarm, as one client sees it."""

    def __init__(self, node: Node, model: ModelInfo, fingerprint: str, config: ClientOptions) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.config = config
        self.events = events.Observers(config.observers)
        """What is told of this model's events. It has to be closed."""
        self.store = HistoryStore(
            config.history_encoding, memory_bytes=config.history_memory, folder=config.history_folder
        )
        """Where the histories of all sessions are."""
        self.broken_pairs = BrokenPairs(now)
        self.round_trips = RoundTrips(now)
        self.adapter_sync = AdapterSync()
        self._node = node
        self._directory = DirectoryCache(node, model, fingerprint, config)
        self._meeting = Meeting(
            node.transport, self.round_trips, seconds=config.measure_seconds, patience=config.patience_seconds
        )
        self._health = PeerHealth(clock=now)
        self._in_flight: dict[str, PeerInFlight] = {}  # to each server
        self._under_way = WorkInFlight()
        self._head_found = True

    # -- routes -------------------------------------------------------------------------------------------------------

    async def route(
        self,
        span: Span,
        excluded: Set[Holding] = frozenset(),
        *,
        needs: Needs,
        upstream: ServerInfo | None = None,
        downstream: ServerInfo | None = None,
    ) -> Route:
        """The fastest chain of usable servers over a span, which may be a part of a ring, between two other servers.

        Where there is a choice, it is among those that have answered. A head that is needed is found if anybody offers
        one.

        Raises `MissingBlocks`, and `SwarmError` if the directory has never answered.
        """
        await self._directory.ensure_fresh()
        view = self._healthy(excluded, needs)
        if view.missing(span):
            await self._directory.refresh()
            view = self._healthy(excluded, needs)
        view = await self._answering(view, span, needs)
        if view.missing(span):  # better a server that failed lately than none
            view = await self._answering(self._not_blocked(excluded, needs), span, needs)
            self._check_offered(span, needs)
        route = choose_route(
            view,
            span,
            needs=replace(needs, head=needs.head and self._has_head(view)),
            known=self.round_trips.picture(apart=self.broken_pairs.now(), under_way=self._under_way.seconds),
            upstream=upstream,
            downstream=downstream,
            chooser=self.config.chooser,
            seed=random.getrandbits(32),
        )
        chosen = tuple((hop.server.peer, hop.span) for hop in route.hops)
        self.events.emit(events.RouteChosen(self.model.name, span, chosen, route.seconds, route.explain))
        return route

    async def _answering(self, view: SwarmView, span: Span, needs: Needs) -> SwarmView:
        """Of these, those that answer."""
        if view.missing(span):
            return view
        return await self._meeting.answering(
            view,
            span,
            needs,
            everybody=self._directory.usable(),
            is_new=self._directory.is_new(),
            known=self.round_trips.picture(),
        )

    def _check_offered(self, span: Span, needs: Needs) -> None:
        """Raises `UnsupportedOperation` if there are servers for all blocks, but not for single passes."""
        usable = self._directory.usable()
        trained = usable.only(lambda server: server.training)
        if not needs.ring and not usable.missing(span) and (blocks := trained.missing(span)):
            raise UnsupportedOperation(
                f"blocks {format_blocks(blocks)} are served for generating only",
                hint="servers that were started with --no-training offer no forward and backward passes",
            )

    def _has_head(self, view: SwarmView) -> bool:
        """Whether a server offers the output head; the log tells when that changes."""
        (last,) = view.holders(Span(view.num_blocks - 1, view.num_blocks))
        found = any(server.head for server in last)
        if found != self._head_found:
            self._head_found = found
            log.log(
                logging.INFO if found else logging.WARNING,
                "the output head is computed %s",
                "by servers" if found else "here: no server offers it now",
            )
        return found

    def _not_blocked(self, excluded: Set[Holding], needs: Needs | None = None) -> SwarmView:
        """Of those that are usable, those who may be asked now, for this."""
        return self._directory.usable().only(
            lambda each: (
                holding(each) not in excluded
                and not self._health.blocked(each.peer)
                and (each.training or needs is None or needs.ring)
            )
        )

    def _healthy(self, excluded: Set[Holding], needs: Needs | None = None) -> SwarmView:
        """Of these, those that have not failed lately."""
        return self._not_blocked(excluded, needs).only(lambda server: not self._health.deprioritized(server.peer))

    async def with_failover(self, span: Span, act: Callable[[Set[Holding]], Awaitable[T]]) -> T:
        """Do `act` until it succeeds, each time avoiding the servers that have failed.

        It is given the servers that, as they are now, cannot do this. Raises `MissingBlocks` at once if nobody serves
        some blocks of the span, and after the client's patience if those who do keep failing or have no room.
        """
        give_up_at: float | None = None
        excluded: set[Holding] = set()
        while True:
            began = now()
            try:
                return await act(excluded)
            except ServerLost as lost:
                self.events.emit(events.ServerLost(lost.peer, str(lost)))
                self.blame(lost, since=began)
            except ServerBusy as busy:
                log.info("%s", busy)
                self.blame(busy)
            except Misrouted as misrouted:
                log.info("%s", misrouted)
                self.blame(misrouted)
                excluded.update(
                    holding(each) for each in self._directory.known().servers if each.peer == misrouted.peer
                )
                self._directory.expire()  # it may hold other blocks by now
            except MissingBlocks:
                if self._directory.directory_error is None:
                    if missing := self._directory.usable().missing(span):
                        raise self._directory.missing(missing) from None
                    if self._directory.usable().only(lambda server: holding(server) not in excluded).missing(span):
                        raise self._exhausted(span, excluded) from None
                wait = self._health.seconds_left() or 1.0
                give_up_at = give_up_at or now() + self.config.patience_seconds
                if now() + wait > give_up_at:
                    raise self._directory.directory_error or self._exhausted(span, excluded) from None
                log.warning("waiting %.1f s for a server that holds blocks %s", wait, span)
                await asyncio.sleep(wait)

    def _exhausted(self, span: Span, excluded: Set[Holding]) -> MissingBlocks:
        unavailable = self._not_blocked(excluded).missing(span) or tuple(span)
        reasons = "; ".join((*self._health.reasons(), *self._meeting.reasons()))
        return MissingBlocks(
            f"no server for blocks {format_blocks(unavailable)} answers: {reasons}",
            blocks=unavailable,
        )

    async def connect(self, server: ServerInfo) -> Connection:
        """A new connection to a server. Raises `ServerLost`."""
        measured = functools.partial(self.round_trips.measured, server.peer)
        in_flight = self._in_flight.setdefault(server.peer, PeerInFlight())
        return await Connection.open(
            self._node.transport, server, self.config, in_flight=in_flight, round_trip=measured
        )

    def blame(self, error: PeerError, *, since: float | None = None) -> None:
        """A server has failed, in something that began at `since`: it is avoided from now on, as that deserves."""
        match error:
            case ServerBusy():
                self._health.record_busy(error.peer, error.retry_after, str(error))
            case Misrouted():
                self._health.record_misrouted(error.peer, str(error))
            case _:
                self._health.record_failure(error.peer, str(error), since=now() if since is None else since)
                self._meeting.lost(error.peer)

    def permit(self, allowed: frozenset[str] | None, blocked: frozenset[str]) -> None:
        """From now on, routes go through these servers only, and not through those."""
        self.config = replace(self.config, allowed_servers=allowed, blocked_servers=blocked)
        self._directory.permit(self.config)

    def record_answer(self, hop: Hop, took: Iterable[tuple[int, float]] = ()) -> None:
        """A server did its work: whatever was held against it is forgotten.

        What so many tokens `took` it, in seconds, corrects what it announces.
        """
        self._health.record_success(hop.server.peer)
        self._meeting.record_answer(hop.server.peer)
        for num_tokens, seconds in took:
            announced = announced_seconds(hop.server, len(hop.span), num_tokens)
            self.round_trips.measured_step(hop.server.peer, announced, seconds)

    def price(
        self,
        hops: Sequence[Hop],
        *,
        needs: Needs,
        upstream: ServerInfo | None = None,
        downstream: ServerInfo | None = None,
    ) -> Route:
        """What a step costs on a chain that stands, where a session is open already."""
        known = self.round_trips.picture(apart=self.broken_pairs.now(), under_way=self._under_way.seconds)
        return price_route(
            hops, needs=replace(needs, needed_tokens=0), known=known, upstream=upstream, downstream=downstream
        )

    @contextlib.contextmanager
    def reserving(self, route: Route) -> Iterator[None]:
        """Other passes see that this one is on its way, and take other servers where that is faster."""
        self._under_way = self._under_way.with_(route)
        try:
            yield
        finally:
            self._under_way = self._under_way.without(route)

    async def dtype(self, *, own: str) -> str | None:
        """What the swarm computes in, None if it has no server yet; `own` is the model's dtype.

        Raises `SwarmError` if the directory has never answered.
        """
        await self._directory.ensure_fresh()
        return self._directory.dtype(own=own)

    async def num_servers(self, span: Span) -> int:
        """How many servers share single passes on these blocks.

        Raises `SwarmError` if the directory has never answered.
        """
        await self._directory.ensure_fresh()
        trusted = self._healthy(frozenset(), Needs(ring=False)).servers
        return sum(server.span.start < span.end and span.start < server.span.end for server in trusted)

    def is_avoided(self, peer: str) -> bool:
        """Whether a server has failed lately."""
        return self._health.deprioritized(peer) or self._health.blocked(peer)
