"""Connections that stay open between the single passes of one client."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from types import TracebackType
from typing import Self

from shoal.client.swarm.adapter_sync import MAX_ADAPTER_UPLOADS, AdapterSync
from shoal.client.swarm.connection import Connection
from shoal.client.training.ring_turn import RingTurn
from shoal.concurrency import now
from shoal.errors import Misrouted, PeerError
from shoal.model.peft.factors import AdapterFactors
from shoal.net.wire.codec import Tensors
from shoal.peers import ServerInfo
from shoal.protocol import Backward, Forward, Norms, NormsResult, NotCached, PassResult, SumResult, TakeSum

IDLE_SECONDS = 60.0
"""A connection that was idle for so long is closed. The server then forgets the adapters that it was sent over it."""
_RESULTS: dict[type, type[NormsResult | SumResult]] = {Norms: NormsResult, TakeSum: SumResult}
"""What answers those requests that are no passes."""


class _NotPushed(Exception):
    """A server was not pushed what it waits for."""


class ConnectionPool:
    """Connections for single passes, with one pass at a time on each.

    While it is open (`async with`), a task of it closes idle connections.
    """

    def __init__(self, connect: Callable[[ServerInfo], Awaitable[Connection]], adapter_sync: AdapterSync) -> None:
        self._connect = connect
        self._adapter_sync = adapter_sync
        self._idle: dict[str, list[tuple[float, Connection]]] = defaultdict(list)
        self._sweeping: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all idle connections. Those in use are closed when their pass ends."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        while self._idle:
            _, connections = self._idle.popitem()
            for _, connection in connections:
                await connection.close()

    async def ask(
        self,
        server: ServerInfo,
        request: Forward | Backward | Norms | TakeSum,
        tensors: Tensors,
        adapters: Collection[AdapterFactors],
        *,
        usual_seconds: float,
        turn: RingTurn | None = None,
    ) -> tuple[Connection, PassResult | NormsResult | SumResult | NotCached, Tensors]:
        """A server's answer, and the connection that it came over. The server is sent the adapters that it misses.

        `turn` is told the connection. Raises `PeerError`s.
        """
        async with self._connection(server) as connection:
            if turn is not None:
                turn.connection = connection
            return await self._asked(connection, server, request, tensors, adapters, usual_seconds=usual_seconds)

    async def ask_in_ring(
        self,
        server: ServerInfo,
        request: Forward | Backward,
        tensors: Tensors,
        adapters: Collection[AdapterFactors],
        turn: RingTurn,
        *,
        usual_seconds: float,
    ) -> tuple[Connection, PassResult | NormsResult | SumResult | NotCached, Tensors] | None:
        """The same in a ring, once all of its servers are connected and have their adapters.

        None if the server was not pushed the inputs. If it has lost adapters meanwhile, it says so: its inputs may
        have come in vain, and the caller asks it again. Raises `PeerError`s.
        """
        with contextlib.suppress(_NotPushed):
            async with self._connection(server) as connection:
                turn.connection = connection
                await self._adapter_sync.ensure_loaded(connection, server, adapters)
                await turn.come()
                if turn.push is None:
                    return await self._asked(
                        connection, server, request, tensors, adapters, usual_seconds=usual_seconds
                    )
                answered = await connection.ask_pushed(
                    request, tensors, turn.push, expect=PassResult | NotCached, usual_seconds=usual_seconds
                )
                if answered is None:
                    raise _NotPushed  # it still waits: it is told by the end of the connection
                reply, answer = answered
                assert isinstance(reply, PassResult | NotCached)
                if isinstance(reply, NotCached):
                    self._adapter_sync.forget(server.peer, adapters, reply.adapters)
                return connection, reply, answer
        return None

    async def _asked(
        self,
        connection: Connection,
        server: ServerInfo,
        request: Forward | Backward | Norms | TakeSum,
        tensors: Tensors,
        adapters: Collection[AdapterFactors],
        *,
        usual_seconds: float,
    ) -> tuple[Connection, PassResult | NormsResult | SumResult | NotCached, Tensors]:
        result_type = _RESULTS.get(type(request), PassResult)
        for _ in range(MAX_ADAPTER_UPLOADS):
            await self._adapter_sync.ensure_loaded(connection, server, adapters)
            reply, answer = await connection.ask(
                request, tensors, expect=result_type | NotCached, usual_seconds=usual_seconds
            )
            assert isinstance(reply, PassResult | NormsResult | SumResult | NotCached)
            if not isinstance(reply, NotCached) or reply.kept:
                return connection, reply, answer
            self._adapter_sync.forget(server.peer, adapters, reply.adapters)
        raise Misrouted(f"{server.peer} has no room for these adapters", peer=server.peer)

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
            for connection in self._take_stale():  # a pass that begins meanwhile does not take one of these
                with contextlib.suppress(PeerError):
                    await connection.close()

    def _take_stale(self) -> list[Connection]:
        """Take the connections out of the pool that have failed, or that were idle for long."""
        stale: list[Connection] = []
        idle, self._idle = self._idle, defaultdict(list)
        for peer, connections in idle.items():
            for since, connection in connections:
                if connection.error is not None or now() - since > IDLE_SECONDS:
                    stale.append(connection)
                else:
                    self._idle[peer].append((since, connection))
        return stale
