"""Pings servers before a route is chosen: where there is a choice, routes use servers that have answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from shoal.client.swarm.measurements import Measurements
from shoal.concurrency import now
from shoal.net.ping import DIAL_SECONDS, PONG_SECONDS, PingAnswer, ask
from shoal.net.transport import Transport
from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Measured, Needs
from shoal.policy.routing.proof import servers_to_probe, sole_holders
from shoal.policy.view import SwarmView
from shoal.spans import Span

log = logging.getLogger(__name__)

FIRST_PINGED = 32
"""Servers of the first round. Each round has twice as many, until those that answered hold all blocks."""
NEXT_ROUND_SECONDS = 0.25
"""How soon after a round the next one begins, if those that have answered by then do not hold all blocks."""
MOST_PINGED = 256
"""Servers of the largest round: all of them are dialed at once."""
SILENT_SECONDS = 60.0
"""A server that did not answer is pinged again after so long, or when there is no route without it."""
FRESH_SECONDS = 20.0
"""How long what a server answered of its queue and its room is believed more than what it announced."""
PATIENCE_SECONDS = DIAL_SECONDS + 2 * PONG_SECONDS
"""How long such a server has, unless the client is less patient: a first connection over a relay takes long."""


class ServerProbe:
    """Pings servers, remembers which of them answered, and records their round trips in `measurements`.

    A round takes at most `seconds`. If that is 0, no server is pinged, and all count as if they had answered.
    """

    def __init__(self, transport: Transport, measurements: Measurements, *, seconds: float, patience: float) -> None:
        self._transport = transport
        self._measurements = measurements
        self._seconds = seconds
        self._patience = min(patience, PATIENCE_SECONDS)
        self._answered: set[str] = set()
        self._silent: dict[str, float] = {}  # when each was pinged in vain
        self._said: dict[str, tuple[float, PingAnswer]] = {}  # by peer, and when
        self._probed_version = 0
        self._probing = asyncio.Lock()

    def record_answer(self, peer: str) -> None:
        """A server has answered a request or a ping."""
        self._answered.add(peer)
        self._silent.pop(peer, None)

    def record_failure(self, peer: str) -> None:
        """A server is lost: it has to answer again before it is used."""
        self._answered.discard(peer)

    def reasons(self) -> list[str]:
        """How many servers were pinged in vain lately, for an error message."""
        recent = [peer for peer, at in self._silent.items() if now() - at < SILENT_SECONDS]
        return [f"{len(recent)} servers were asked and did not answer"] if recent else []

    async def answering(
        self, view: SwarmView, span: Span, needs: Needs, *, everyone: SwarmView, version: int, known: Measured
    ) -> SwarmView:
        """The same view with those servers only that a route over a span may use. Some are pinged first.

        What servers have answered of their queues and their room replaces what they announced, while it is fresh.

        `everyone` is a view of all servers, with those that are not to be used now. With each new `version` of the
        directory, a round is pinged even if the servers that have answered suffice: there may be better ones.
        """
        if not self._seconds:
            return view
        is_new, self._probed_version = version != self._probed_version, version
        alone = sole_holders(everyone, span)

        def answered() -> SwarmView:
            return view.only(lambda server: server.peer in self._answered or server.peer in alone)

        def suffices() -> bool:
            return not answered().missing(span)

        def strangers(asked: Collection[str], most: int) -> tuple[ServerInfo, ...]:
            silent = {peer for peer, at in self._silent.items() if now() - at < SILENT_SECONDS}
            proven = self._answered | alone
            return servers_to_probe(view, span, costs, proven=proven, silent=silent | {*asked}, most=most)

        if is_new or not suffices():
            costs = Costs(needs, known)
            async with self._probing:
                await self._ping_in_rounds(strangers, suffices, is_new=is_new)
                if not suffices():
                    last = servers_to_probe(view, span, costs, proven=self._answered | alone, most=MOST_PINGED)
                    await self._ping(last, self._patience, enough=suffices)
        found = answered()
        return replace(found, servers=tuple(map(self._as_it_is_now, found.servers)))

    def _as_it_is_now(self, server: ServerInfo) -> ServerInfo:
        at, said = self._said.get(server.peer, (float("-inf"), None))
        return server if said is None or now() - at > FRESH_SECONDS else said.of(server)

    async def _ping_in_rounds(
        self,
        strangers: Callable[[Collection[str], int], Sequence[ServerInfo]],
        suffices: Callable[[], bool],
        *,
        is_new: bool,
    ) -> None:
        """Ping ever more `strangers` until those that have answered suffice, or all had their time.

        A round begins soon after the one before it, whose servers keep their time. If the view `is_new`, a first round
        is pinged in any case, and has all its time.
        """
        pinging: dict[asyncio.Task[None], tuple[ServerInfo, float]] = {}  # and until when each has time
        num_pinged, next_at, first_until = FIRST_PINGED, now(), now() + self._seconds
        try:
            while not suffices() or (is_new and now() < first_until):
                time = now()
                if time >= next_at and (not pinging or not suffices()):
                    servers = strangers([server.peer for server, _ in pinging.values()], num_pinged)
                    for server in servers:
                        pinging[asyncio.create_task(self._ping_one(server))] = server, time + self._seconds
                    num_pinged = min(2 * num_pinged, MOST_PINGED)
                    next_at = time + NEXT_ROUND_SECONDS if servers else float("inf")
                waiting = {task: until for task, (_, until) in pinging.items() if not task.done() and until > time}
                if not waiting and (suffices() or next_at == float("inf")):
                    break
                until = min((*waiting.values(), first_until if suffices() else next_at))
                if waiting:
                    await asyncio.wait(waiting, timeout=until - time, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(until - time)
        finally:
            self._note_silent([(server, now() >= until) for server, until in pinging.values()])
            await _cancel(pinging)

    async def _ping(self, servers: Sequence[ServerInfo], seconds: float, *, enough: Callable[[], bool]) -> None:
        """Ping all of these at once, until `enough` of them have answered or the seconds are over."""
        began = now()
        pinging = [asyncio.create_task(self._ping_one(server)) for server in servers]
        waiting = {*pinging}
        try:
            while waiting and not enough() and (left := began + seconds - now()) > 0:
                _, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(pinging)
        self._note_silent([(server, not enough()) for server in servers])

    def _note_silent(self, asked: Iterable[tuple[ServerInfo, bool]]) -> None:
        """Note which of these have not answered, of those that had their time."""
        for server, had_time in asked:
            if had_time and server.peer not in self._answered:
                log.debug("%s does not answer", server.peer)
                self._silent[server.peer] = now()

    async def _ping_one(self, server: ServerInfo) -> None:
        answer = await ask(self._transport, server.peer, server.addresses)
        if answer is not None:
            self._said[server.peer] = (now(), answer)
            self._measurements.record_round_trip(server.peer, answer.seconds)
            self.record_answer(server.peer)


async def _cancel(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
