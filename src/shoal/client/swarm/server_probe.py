"""The servers that have answered this client: routes go over no others where there is a choice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from shoal.client.swarm.peer_timings import PeerTimings
from shoal.concurrency import now
from shoal.net.ping import DIAL_SECONDS, PONG_SECONDS, distance
from shoal.net.transport import Transport
from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Measured, Needs
from shoal.policy.routing.proof import servers_to_probe, sole_holders
from shoal.policy.view import SwarmView
from shoal.spans import Span

log = logging.getLogger(__name__)

FIRST_ASKED = 32
"""Servers that are asked at once; twice as many each time that those who answered do not hold all blocks."""
MOST_ASKED = 256
SILENT_SECONDS = 60.0
"""A server that did not answer is asked again after so long, or when there is no way without it."""
PATIENCE_SECONDS = DIAL_SECONDS + 2 * PONG_SECONDS
"""So long it has then, or as long as the client is patient: first connections over relays take many round trips."""


class Meeting:
    """Asks servers whether they are there, and measures how far they are.

    With `seconds` of 0 none is asked, and all count as if they had answered.
    """

    def __init__(self, transport: Transport, timings: PeerTimings, *, seconds: float, patience: float) -> None:
        self._transport = transport
        self._timings = timings
        self._seconds = seconds
        self._patience = min(patience, PATIENCE_SECONDS)
        self._answered: set[str] = set()
        self._silent: dict[str, float] = {}  # when each was asked in vain
        self._asking = asyncio.Lock()

    def record_answer(self, peer: str) -> None:
        """A server has done something for us, or has told us that it is there."""
        self._answered.add(peer)
        self._silent.pop(peer, None)

    def lost(self, peer: str) -> None:
        """It has to answer again before it is used."""
        self._answered.discard(peer)

    def reasons(self) -> list[str]:
        """Who was asked in vain, for an error message."""
        recent = [peer for peer, at in self._silent.items() if now() - at < SILENT_SECONDS]
        return [f"{len(recent)} servers were asked and did not answer"] if recent else []

    async def answering(
        self, view: SwarmView, span: Span, needs: Needs, *, everybody: SwarmView, is_new: bool, known: Measured
    ) -> SwarmView:
        """Of a view, those that a route over a span may use; some have to be asked first.

        `everybody` are those that hold blocks, also those that are not to be used now. If the view `is_new`, others
        than those that have answered already are asked too: there may be better ones.
        """
        if not self._seconds:
            return view
        alone = sole_holders(everybody, span)

        def usable() -> SwarmView:
            return view.only(lambda server: server.peer in self._answered or server.peer in alone)

        def suffices() -> bool:
            return not usable().missing(span)

        if suffices() and not is_new:
            return usable()
        async with self._asking:
            costs = Costs((), needs, known)
            num, asks = FIRST_ASKED, is_new
            while asks or not suffices():
                silent = {peer for peer, at in self._silent.items() if now() - at < SILENT_SECONDS}
                strangers = servers_to_probe(view, span, costs, known=self._answered | alone | silent, most=num)
                if not strangers:
                    break
                await self._ask(strangers, self._seconds, enough=suffices if not asks else lambda: False)
                num, asks = min(2 * num, MOST_ASKED), False
            if not suffices():
                strangers = servers_to_probe(view, span, costs, known=self._answered | alone, most=MOST_ASKED)
                await self._ask(strangers, self._patience, enough=suffices)
        return usable()

    async def _ask(self, servers: Sequence[ServerInfo], seconds: float, *, enough: Callable[[], bool]) -> None:
        """Ask all of these at once, until there are enough that answered, or time is up."""
        asked_at = now()
        asking = {asyncio.create_task(self._ask_one(server)) for server in servers}
        waiting = set(asking)
        try:
            while waiting and not enough() and (left := asked_at + seconds - now()) > 0:
                _, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if waiting and enough():
            return  # the others may have answered a moment later
        for server in servers:
            if server.peer not in self._answered:
                log.debug("%s does not answer", server.peer)
                self._silent[server.peer] = now()

    async def _ask_one(self, server: ServerInfo) -> None:
        seconds = await distance(self._transport, server.peer, server.addresses)
        if seconds is not None:
            self._timings.record_round_trip(server.peer, seconds)
            self.record_answer(server.peer)
