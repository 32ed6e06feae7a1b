"""Watches other servers over open streams: their end is noticed at once, and silence after some seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.policy.watching import believed_gone
from shoal.protocol import Ping, Pong, ProtocolViolation

log = logging.getLogger(__name__)

PING_SECONDS = 5.0
"""How often a watched server is pinged. One that hangs is noticed after this and two `PONG_SECONDS`."""
PONG_SECONDS = 3.0
"""How long opening a stream, or the answer to a ping, may take: longer than a busy event loop is blocked."""
RETRY_SECONDS = 3.0
"""How soon a server that did not answer is tried again."""
REOPEN_SECONDS = 0.2
"""How soon another stream is tried after one that ended: a killed process needs about as long to be gone."""


class PeerWatch:
    """Watches the servers that `watch` names, while `running()`. `on_change` is called when `gone` changes.

    A server that has never answered is not lost: perhaps it only cannot be reached from here.
    """

    def __init__(self, transport: Transport, *, on_change: Callable[[], None]) -> None:
        self._transport = transport
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by peer
        self._ended: set[asyncio.Task[None]] = set()
        self._answering: set[str] = set()
        self._lost: set[str] = set()
        self._is_running = False

    @property
    def gone(self) -> frozenset[str]:
        """The peers that are believed to be gone."""
        return believed_gone(self._lost, self._answering)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Servers may be watched while this is entered."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self.watch(())
            await asyncio.gather(*self._ended, return_exceptions=True)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Call `on_change` if what is done in the context changes which peers are believed to be gone."""
        before = self.gone
        yield
        if self.gone != before:
            self._on_change()

    def watch(self, servers: Iterable[ServerInfo]) -> None:
        """From now on, watch these servers only. What is known of the others is forgotten."""
        wanted = {server.peer: server for server in servers} if self._is_running else {}
        for peer in self._tasks.keys() - wanted.keys():
            task = self._tasks.pop(peer)
            self._ended.add(task)
            task.add_done_callback(self._ended.discard)
            task.cancel()
            self._answering.discard(peer)
            self._lost.discard(peer)
        for peer, server in wanted.items():
            if peer not in self._tasks:
                self._tasks[peer] = asyncio.create_task(self._follow(server), name=f"shoal-watch-{peer[-8:]}")

    async def _follow(self, server: ServerInfo) -> None:
        is_known = False  # whether it has ever answered
        while True:
            has_answered = await self._until_silent(server)
            with self._changing():
                self._answering.discard(server.peer)
            if has_answered:  # the stream may have ended for many reasons: another one is tried
                is_known = True
                await asyncio.sleep(REOPEN_SECONDS)
                continue
            if is_known and server.peer not in self._lost:
                log.info("%s is gone: it does not answer any more", server.name or server.peer)
                with self._changing():
                    self._lost.add(server.peer)
            await asyncio.sleep(RETRY_SECONDS)

    async def _until_silent(self, server: ServerInfo) -> bool:
        """Ping a server over a new stream until the stream ends or a ping is not answered.

        Returns whether any ping was answered.
        """
        has_answered = False
        with contextlib.suppress(StreamBroken, ProtocolViolation, TimeoutError):
            async with asyncio.timeout(PONG_SECONDS):
                stream = await self._transport.open(server.peer, server.addresses)
            try:
                while await _answers(stream):
                    has_answered = True
                    self._answered(server.peer)
                    await _until_end(stream, PING_SECONDS)
            finally:
                await stream.close()
        return has_answered

    def _answered(self, peer: str) -> None:
        with self._changing():
            self._answering.add(peer)
            self._lost.discard(peer)


async def _answers(stream: Stream) -> bool:
    async with asyncio.timeout(PONG_SECONDS):
        await codec.send(stream, Ping())
        answer, _ = await codec.receive(stream, frozenset())
    return isinstance(answer, Pong)


async def _until_end(stream: Stream, seconds: float) -> None:
    """Wait so long. Raises `StreamBroken` as soon as the stream ends, and `ProtocolViolation` if anything comes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await codec.receive(stream, frozenset())
            raise ProtocolViolation("it was asked nothing")
