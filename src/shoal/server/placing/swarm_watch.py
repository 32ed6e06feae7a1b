"""The swarm as a server sees it: the records of the directory, without the servers that are found to be gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection

from shoal.errors import SwarmError
from shoal.net.transport import Node
from shoal.peers import ServerState
from shoal.policy.claims import machines_in, uncovered
from shoal.policy.machines.machine import Machine
from shoal.policy.view import SwarmView
from shoal.policy.watching import choose_watched
from shoal.protocol import PROTOCOL_VERSION
from shoal.server.placing.peer_watch import PeerWatch
from shoal.server.placing.setup import Setup
from shoal.spans import Span

log = logging.getLogger(__name__)

READ_SECONDS = 10.0
"""How often a server looks at the swarm if nothing is noticed before: moves take longer than that."""
MIN_READ_SECONDS = 0.5
"""The shortest time between two readings that are due to something that was noticed."""


class SwarmWatch:
    """Reads the directory, and watches the servers that it names, while `running()`.

    Only servers with the weights of this one count: no route goes through others.
    """

    def __init__(self, node: Node, setup: Setup) -> None:
        self._node = node
        self._setup = setup
        self._changed = asyncio.Event()
        self._peers = PeerWatch(node.transport, on_change=self._changed.set)
        self._view = SwarmView(setup.model.num_blocks)
        self._read_at = float("-inf")
        self._clock = asyncio.get_running_loop().time

    def running(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Servers are watched while this is entered."""
        return self._peers.running()

    @property
    def view(self) -> SwarmView:
        """The other servers, as they were last seen."""
        gone = self._peers.gone
        return self._view.only(lambda server: server.peer not in gone)

    def machines(self, now: float) -> list[Machine]:
        """The other servers as placement sees them, at the Unix time `now`."""
        return machines_in(self.view, now=now)

    async def crowd(self) -> tuple[Machine, ...] | None:
        """All servers of a swarm that is too large to be read one by one, as averages; `None` of a smaller one.

        Raises `SwarmError` if the directory does not answer.
        """
        histogram = await self._node.directory.histogram(self._setup.model)
        return None if histogram.exact else histogram.machines

    def take(self, view: SwarmView) -> None:
        """Use a view of the directory that was read for another purpose. A change in it is a reason to look."""
        before = self._view
        self._use(view)
        if _holdings(before) != _holdings(self._view):
            self._changed.set()

    def _use(self, view: SwarmView) -> None:
        own, fingerprint = self._node.transport.peer, self._setup.fingerprint
        self._view = view.only(
            lambda server: (
                server.peer != own and server.fingerprint == fingerprint and server.protocol == PROTOCOL_VERSION
            )
        )
        self._read_at = self._clock()
        self._peers.watch(choose_watched(self._view, own))

    async def read(self, blocks: Collection[int] = ()) -> SwarmView:
        """The other servers, as the directory names them now; of a large swarm some, with more that hold `blocks`.

        Raises `SwarmError` if the directory does not answer.
        """
        model = self._setup.model
        self._use(SwarmView(model.num_blocks, await self._node.directory.servers(model, blocks=blocks)))
        return self.view

    async def uncovered(self, held: Span, kept: Span | None, *, now: float) -> list[int]:
        """The blocks of `held` that no server would serve if this one gave up all but `kept` at the Unix time `now`.

        If the directory does not answer, the servers that it named last count.
        """
        with contextlib.suppress(SwarmError):
            await self.read()
        return uncovered(held, kept, self.machines(now))

    async def look(self, until: float | None = None) -> SwarmView:
        """The other servers, as soon as there is a reason to look at them.

        That is when something was noticed, after `READ_SECONDS`, and at the time `until` of the event loop's clock. If
        the directory does not answer, they are those that it named last.
        """
        due = min(self._read_at + READ_SECONDS, float("inf") if until is None else until)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(max(due, self._clock())):
                await self._changed.wait()
                # several changes often come together
                await asyncio.sleep(self._read_at + MIN_READ_SECONDS - self._clock())
        self._changed.clear()
        try:
            return await self.read()
        except SwarmError as failure:
            log.info("the server cannot see the swarm: %s", failure)
            self._read_at = self._clock()
            return self.view


def _holdings(view: SwarmView) -> frozenset[tuple[str, Span, Span | None, ServerState]]:
    return frozenset((server.peer, server.span, server.wants, server.state) for server in view.servers)
