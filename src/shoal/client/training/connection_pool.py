"""Connections that stay open between single passes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from shoal.client.swarm.adapter_sync import AdapterSync
from shoal.client.swarm.connection import Connection
from shoal.concurrency import now
from shoal.errors import Misrouted, PeerError
from shoal.model.peft.factors import Factors
from shoal.net.wire.codec import Tensors
from shoal.peers import ServerInfo
from shoal.protocol import Backward, Forward, Norms, NormsResult, NotCached, PassResult

IDLE_SECONDS = 60.0
"""A connection that nobody has used for so long is closed. The server then forgets what it was taught."""
MAX_ADAPTER_UPLOADS = 3
"""A server that lacks an adapter that it was sent so often has no room for it."""


class ConnectionPool:
    """Connections for single passes, one at a time on each."""

    def __init__(self, connect: Callable[[ServerInfo], Awaitable[Connection]], adapter_sync: AdapterSync) -> None:
        self._connect = connect
        self._adapter_sync = adapter_sync
        self._idle: dict[str, list[tuple[float, Connection]]] = defaultdict(list)
        self._sweeping: asyncio.Task[None] | None = None
        self._closed = False

    async def ask(
        self,
        server: ServerInfo,
        request: Forward | Backward | Norms,
        tensors: Tensors,
        adapters: Collection[Factors],
        *,
        usual_seconds: float,
    ) -> tuple[Connection, PassResult | NormsResult | NotCached, Tensors]:
        """A server's answer; one that lacks adapters is sent them. Raises `PeerError`s."""
        result_type = NormsResult if isinstance(request, Norms) else PassResult
        async with self._connection(server) as connection:
            for _ in range(MAX_ADAPTER_UPLOADS):
                await self._adapter_sync.ensure_loaded(connection, server, adapters)
                reply, record_answer = await connection.ask(
                    request, tensors, expect=result_type | NotCached, usual_seconds=usual_seconds
                )
                assert isinstance(reply, PassResult | NormsResult | NotCached)
                if not isinstance(reply, NotCached) or reply.kept:
                    return connection, reply, record_answer
                self._adapter_sync.forget(server.peer, adapters, reply.adapters)
            raise Misrouted(f"{server.peer} has no room for these adapters", peer=server.peer)

    async def close(self) -> None:
        """Close all that nobody uses just now, and keep none from now on."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        while self._idle:
            _, connections = self._idle.popitem()
            for _, connection in connections:
                await connection.close()

    @contextlib.asynccontextmanager
    async def _connection(self, server: ServerInfo) -> AsyncIterator[Connection]:
        connection = await self._take(server)
        try:
            yield connection
        except BaseException:
            await connection.close()
            raise
        if self._closed:
            await connection.close()
            return
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
            for connection in self._take_stale():  # whoever takes one meanwhile finds none of these
                with contextlib.suppress(PeerError):
                    await connection.close()

    def _take_stale(self) -> list[Connection]:
        """Those that have failed, or that nobody has used for long: they are idle no more."""
        stale: list[Connection] = []
        idle, self._idle = self._idle, defaultdict(list)
        for peer, connections in idle.items():
            for since, connection in connections:
                if connection.error is not None or now() - since > IDLE_SECONDS:
                    stale.append(connection)
                else:
                    self._idle[peer].append((since, connection))
        return stale
