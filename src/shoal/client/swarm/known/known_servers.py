"""Which servers of a model a client may use now, by all that it knows of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.audit_book import AuditBook
from shoal.client.swarm.known.directory_cache import DirectoryCache, Holding, holding
from shoal.client.swarm.known.peer_health import PeerHealth
from shoal.client.swarm.known.server_probe import ServerProbe
from shoal.client.swarm.measurements import Measurements
from shoal.client.swarm.waits import Outage
from shoal.concurrency import now
from shoal.errors import Interrupted, Misrouted, MissingBlocks, PeerError, ServerBusy, ServerLate, UnsupportedOperation
from shoal.peers import ServerInfo, ServerState
from shoal.policy.routing.costs import Needs
from shoal.policy.view import SwarmView, format_blocks
from shoal.policy.waiting import LOOK_SECONDS
from shoal.spans import Span

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""How long to wait for servers that hold the blocks, and did not answer, if none is blocked."""


class KnownServers:
    """The servers that the directory names, without those that failed, lied, or do not answer.

    `measurements` say which of them have computed steps for this client.
    """

    def __init__(
        self, directory: DirectoryCache, probe: ServerProbe, measurements: Measurements, audits: AuditBook
    ) -> None:
        self._directory = directory
        self._probe = probe
        self._measurements = measurements
        self._audits = audits
        self._health = PeerHealth(clock=now)
        self._head_is_offered = True

    # -- views --------------------------------------------------------------------------------------------------------

    async def proven(
        self, span: Span, excluded: Set[Holding], needs: Needs, *, rather_confirmed: bool = False
    ) -> SwarmView:
        """The servers that a route over a span may use. The directory is read if it is old, and some are pinged.

        With `rather_confirmed`, only those servers of a block that have computed for this client, if there are any; so
        it is once the client has met a server that does nothing. A server that failed lately is there rather than none.

        Raises `UnsupportedOperation` if all servers of a block refuse single passes, which are needed, and `SwarmError`
        if the directory has never answered.
        """
        rather_confirmed |= self._health.is_wary
        if rather_confirmed:
            confirmed = self._healthy(excluded, needs).only(self._is_confirmed)
            if not confirmed.missing(span):
                return confirmed
        await self._directory.ensure_fresh()
        view = self._healthy(excluded, needs)
        if missing := view.missing(span):
            await self._directory.refresh(missing)
            view = self._healthy(excluded, needs)
        if rather_confirmed:
            view = view.rather(self._is_confirmed, span)
        view = await self._answering(view, span, needs)
        if view.missing(span):
            view = await self._answering(self._not_blocked(excluded, needs), span, needs)
            self._check_offered(span, needs)
        return view

    def _is_confirmed(self, server: ServerInfo) -> bool:
        return self._measurements.is_confirmed(server.peer)

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
            known=self._measurements.measured(),
        )

    def _not_blocked(self, excluded: Set[Holding], needs: Needs | None = None) -> SwarmView:
        """The servers that may be asked now for what is needed: not blocked, not excluded, not refusing training."""
        return self._directory.usable().only(
            lambda each: (
                holding(each) not in excluded
                and not self._audits.is_liar(each.peer)
                and not self._health.blocked(each.peer)
                and (each.training or needs is None or needs.session)
            )
        )

    def _healthy(self, excluded: Set[Holding], needs: Needs | None = None) -> SwarmView:
        """Of these, the servers that are not deprioritized: they have not failed lately."""
        return self._not_blocked(excluded, needs).only(lambda server: not self._health.deprioritized(server.peer))

    async def everybody(self) -> SwarmView:
        """All servers of this model that the directory has, whatever they do at present."""
        await self._directory.ensure_fresh()
        return self._directory.everybody()

    async def present(self) -> SwarmView:
        """The servers that can be used now, as far as this client knows: without those that it has found dead."""
        await self._directory.ensure_fresh()
        return self._healthy(frozenset(), Needs())

    # -- single questions ---------------------------------------------------------------------------------------------

    async def check_held(self, span: Span, excluded: Set[Holding], needs: Needs) -> None:
        """Raises `MissingBlocks` if no other servers are known that hold these blocks. The directory is not asked again
        because of that, as `proven` does it."""
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

    def has_head(self, view: SwarmView) -> bool:
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

    async def dtype(self, *, own: str) -> str | None:
        """The dtype that the swarm computes in; None if it has no server yet. `own` is the model's dtype.

        Raises `SwarmError` if the directory has never answered.
        """
        await self._directory.ensure_fresh()
        return self._directory.dtype(own=own)

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

    def holdings(self, peers: Set[str]) -> set[Holding]:
        """What these peers announce to hold."""
        return {each for peer in peers for each in self._directory.holdings(peer)}

    def is_avoided(self, peer: str) -> bool:
        """Whether a server has failed lately, said that it is busy, or was found lying."""
        return self._health.deprioritized(peer) or self._health.blocked(peer) or self._audits.is_liar(peer)

    def is_lost(self, peer: str) -> bool:
        """Whether a server has failed, and has not answered or announced itself since. A busy one is not lost."""
        return self._health.lost(peer)

    def is_usable(self, server: ServerInfo) -> bool:
        """Whether a server has this client's weights, and the user permits it."""
        return self._directory.is_usable(server)

    # -- what happened ------------------------------------------------------------------------------------------------

    def record_answer(self, peer: str) -> None:
        """A server did its work: its failures are forgotten."""
        self._health.record_success(peer)
        self._probe.record_answer(peer)

    def record_overtaken(self, peer: str, seconds: float) -> None:
        """A server has not computed a step in `seconds`, and another one has. Once is no reason to avoid it.

        It is if the server has never computed any for this client.
        """
        log.info("%s gave nothing for %.1f s: another server takes its place", peer, seconds)
        reason = f"gave nothing for {seconds:.1f} s, and others were faster"
        self._health.record_overtaken(peer, reason, is_proven=self._measurements.is_confirmed(peer))

    def blame(self, error: PeerError, *, since: float | None = None) -> None:
        """Keep away from a server that failed a request which began at the time `since`, now by default."""
        if isinstance(error, Interrupted):  # it did nothing wrong
            return
        self._health.record_error(error, since=now() if since is None else since)
        if not isinstance(error, ServerBusy | ServerLate | Misrouted):
            self._probe.record_failure(error.peer)

    def permit(self, config: ClientOptions) -> None:
        """From now on, use the servers that a changed config permits."""
        self._directory.permit(config)

    def misrouted(self, peer: str) -> set[Holding]:
        """A server does not hold what it announced: what that was. The directory is read before it is used again."""
        self._directory.expire()
        return self._directory.holdings(peer)

    def outage(self, span: Span, excluded: Set[Holding], moved: Set[Holding], blocks: Sequence[int]) -> Outage:
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
