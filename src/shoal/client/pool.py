"""Connections that stay open between single passes, and what the servers at their other ends have been taught."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable

from shoal.client.clock import now
from shoal.client.connection import Connection
from shoal.errors import Misrouted, PeerError
from shoal.model.adapters import Factors
from shoal.net.codec import Tensors
from shoal.protocol import Adapter, Backward, Forward, Lacking, Learned, Message, Result
from shoal.spans import ServerInfo

IDLE_SECONDS = 60.0
"""A connection that nobody has used for so long is closed. The server then forgets what it was taught."""
TEACHING_SECONDS = 1.0
LESSONS = 3
"""A server that lacks an adapter that it was sent so often has no room for it."""


class Taught:
    """Which adapters each server has been sent, as far as we know: it may have forgotten them."""

    def __init__(self) -> None:
        self._names: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
        self._teaching: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def teach(self, connection: Connection, adapters: Iterable[Factors]) -> None:
        """Send what the server does not have. Once this returns, it has it. Raises `PeerError`s."""
        async with self._teaching[connection.peer]:
            known = self._names[connection.peer]
            new = [each for each in adapters if known.get((each.block, each.origin)) != each.name]
            if not new:
                return
            questions: list[tuple[Message, Tensors]] = []
            for each in new:
                replaces = known.pop((each.block, each.origin), None)
                message = Adapter(block=each.block, layers=each.layers, replaces=replaces)
                questions.append((message, {"factors": each.values}))
            await connection.ask_all(questions, expect=Learned, usual_seconds=TEACHING_SECONDS)
            known.update({(each.block, each.origin): each.name for each in new})

    def forget(self, peer: str, names: Collection[str]) -> None:
        """A server says that it does not have these."""
        known = self._names[peer]
        for key in [key for key, name in known.items() if name in names]:
            del known[key]


class Pool:
    """Connections for single passes, one at a time on each."""

    def __init__(self, connect: Callable[[ServerInfo], Awaitable[Connection]]) -> None:
        self.taught = Taught()
        self._connect = connect
        self._idle: dict[str, list[tuple[float, Connection]]] = defaultdict(list)
        self._sweeping: asyncio.Task[None] | None = None

    async def ask(
        self,
        server: ServerInfo,
        request: Forward | Backward,
        tensors: Tensors,
        adapters: Collection[Factors],
        *,
        usual_seconds: float,
    ) -> tuple[Connection, Result | Lacking, Tensors]:
        """A server's answer; one that lacks adapters is sent them. Raises `PeerError`s."""
        async with self._connection(server) as connection:
            for _ in range(LESSONS):
                await self.taught.teach(connection, adapters)
                reply, answered = await connection.ask(
                    request, tensors, expect=Result | Lacking, usual_seconds=usual_seconds
                )
                assert isinstance(reply, Result | Lacking)
                if isinstance(reply, Result) or reply.kept:
                    return connection, reply, answered
                self.taught.forget(server.peer, reply.adapters)
            raise Misrouted(f"{server.peer} has no room for these adapters", peer=server.peer)

    @contextlib.asynccontextmanager
    async def _connection(self, server: ServerInfo) -> AsyncIterator[Connection]:
        connection = await self._take(server)
        try:
            yield connection
        except BaseException:
            await connection.close()
            raise
        self._idle[server.peer].append((now(), connection))
        self._sweeping = self._sweeping or asyncio.create_task(self._sweep())

    async def _take(self, server: ServerInfo) -> Connection:
        while self._idle[server.peer]:
            _, connection = self._idle[server.peer].pop()
            if connection.error is None:
                return connection
            await connection.close()
        return await self._connect(server)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SECONDS / 4)
            for connections in self._idle.values():
                for each in list(connections):
                    since, connection = each
                    if connection.error is not None or now() - since > IDLE_SECONDS:
                        connections.remove(each)
                        with contextlib.suppress(PeerError):
                            await connection.close()
