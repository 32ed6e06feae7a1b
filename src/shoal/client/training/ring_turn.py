"""When the servers of a ring are asked for a pass: once each of them can be asked, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from shoal.client.swarm.broken_pairs import AwaitedPush
from shoal.client.swarm.connection import Connection
from shoal.concurrency import now


class RingStart:
    """The moment when all of `num_servers` can be asked."""

    def __init__(self, num_servers: int) -> None:
        self._num_missing = num_servers
        self._all_ready = asyncio.Event()

    async def join(self) -> None:
        """One more server is ready. Returns when all are."""
        self._num_missing -= 1
        if not self._num_missing:
            self._all_ready.set()
        await self._all_ready.wait()

    async def wait(self, asking: Collection[asyncio.Task[Any]]) -> None:
        """Wait for that moment. Raises the error of one of the tasks that ask the servers, if it fails before."""
        ready = asyncio.create_task(self._all_ready.wait())
        try:
            await asyncio.wait({ready, *asking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self._all_ready.is_set():
            for task in asking:
                if task.done():
                    task.result()


class RingTurn:
    """One server's part in a ring: `push` is what the server before it pushes; None if the client sends the inputs.

    The `connection` is that to the server, once there is one. The server `is_ready` once it can be asked.
    """

    def __init__(self, start: RingStart, push: AwaitedPush | None) -> None:
        self.push = push
        self.connection: Connection | None = None
        self.is_ready = False
        self.began_at = now()
        self._start = start

    @property
    def awaiting_since(self) -> float | None:
        """Since when the server owes an answer, to what it was sent whole; None if it owes none."""
        return None if self.connection is None else self.connection.awaiting_since

    async def come(self) -> None:
        """The server is ready. Returns when all are."""
        self.is_ready = True
        await self._start.join()
