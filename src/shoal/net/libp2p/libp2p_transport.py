"""`Transport` over the libp2p daemon, which is started again when it dies."""

from __future__ import annotations

import asyncio
import logging
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from shoal.errors import BootstrapFailed, SwarmError
from shoal.net.addresses import best_first, by_peer, peer_of, port_of
from shoal.net.identity import Identity, public_key
from shoal.net.libp2p.daemon import START_SECONDS, Daemon, DaemonConfig, DaemonFailed, DaemonGone
from shoal.net.libp2p.raw_stream import Libp2pStream
from shoal.net.transport import StreamBroken, StreamHandler
from shoal.net.wire.unfinished_frames import UnfinishedFrames
from shoal.protocol import PROTOCOL

logger = logging.getLogger(__name__)

OPEN_SECONDS = 10.0
DIAL_SECONDS = 8.0
STABLE_SECONDS = 60.0
"""A daemon that lived this long died by accident, and is started again at once."""
DYING_SECONDS = 1.0
SETTLE_SECONDS = 0.2
"""What the daemon gets for sending what it was given before it is ended."""
RESTART_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The pauses between attempts to start the daemon again; the last is repeated."""
MAX_STREAMS = 1024
MAX_STREAMS_PER_PEER = 64
MAX_MET = 256


class Libp2pTransport:
    """Owns the daemon: starts it, starts it again when it dies, and ends it.

    `attach` is called with every daemon that is started and the peers that it is connected to, before any stream is
    opened or accepted through it.
    """

    def __init__(
        self,
        identity: Identity,
        config: DaemonConfig,
        *,
        initial_peers: Sequence[str] = (),
        attach: Callable[[Daemon, Sequence[str]], Awaitable[None]] | None = None,
    ) -> None:
        self._identity = identity
        self._config = config
        self._attach = attach
        self._initial = by_peer(initial_peers)
        self._met: dict[str, tuple[str, ...]] = {}
        self._daemon: Daemon | None = None
        self._up = asyncio.Event()
        self._addresses: tuple[str, ...] = ()
        self._handler: StreamHandler | None = None
        self._unfinished = UnfinishedFrames()
        self._accepted: Counter[str] = Counter()
        self._streams: set[Libp2pStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def peer(self) -> str:
        return self._identity.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def start(self) -> None:
        """Start the daemon and connect to the initial peers.

        Raises `BootstrapFailed` if there are some and none answers, `SwarmError` if the daemon does not start.
        """
        try:
            await self._start_daemon()
        except (DaemonFailed, TimeoutError) as failure:
            await self.close()
            hint = "is the port free, and the host one of this machine's addresses?" if self._config.listen else None
            why = failure if str(failure) else "the libp2p daemon does not answer"
            raise SwarmError(f"the network could not be started: {why}", hint=hint) from None
        except BaseException:
            await self.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> Libp2pStream:
        if self._closed:
            raise StreamBroken("this transport is closed")
        if public_key(peer) is None:
            raise StreamBroken(f"not a peer id: {peer[:64]!r}")
        hints = tuple(address for address in addresses if peer_of(address) == peer)
        if hints and (peer in self._met or len(self._met) < MAX_MET):
            self._met[peer] = hints
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                address, reader, writer = await self._dial(peer, hints)
        except TimeoutError:
            raise StreamBroken(f"{peer} did not answer within {OPEN_SECONDS:.0f} s") from None
        except DaemonFailed as failure:
            raise StreamBroken(f"{peer} cannot be reached: {failure}") from None
        stream = Libp2pStream(
            peer, reader, writer, address=address, unfinished=self._unfinished, on_close=self._streams.discard
        )
        self._streams.add(stream)
        return stream

    async def _dial(self, peer: str, hints: Sequence[str]) -> tuple[str | None, StreamReader, StreamWriter]:
        """A raw stream, by the daemon that runs now or, if it is dying, by the next one."""
        while True:
            await self._up.wait()
            daemon = self._daemon
            assert daemon is not None
            try:
                if hints:
                    await daemon.connect(peer, hints)
                return await daemon.open(peer, PROTOCOL)
            except DaemonGone:
                async with asyncio.timeout(DYING_SECONDS):
                    await daemon.closed.wait()
                if self._daemon is daemon:
                    self._up.clear()

    async def listen(self, handler: StreamHandler) -> None:
        first = self._handler is None
        self._handler = handler
        if first and self._daemon is not None and self._up.is_set():
            try:
                await self._daemon.handle(PROTOCOL, self._accept)
            except DaemonFailed as failure:  # the next daemon will have the handler from its start
                logger.warning("streams are accepted as soon as the network is back: %s", failure)

    async def close(self) -> None:
        self._closed = True
        owned = [self._supervisor, *self._tasks] if self._supervisor is not None else [*self._tasks]
        others = [task for task in owned if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        had_streams = bool(self._streams or others)
        for stream in [*self._streams]:
            await stream.close()
        if self._daemon is not None:
            if had_streams and not self._daemon.closed.is_set():
                await asyncio.sleep(SETTLE_SECONDS)
            await self._daemon.stop()

    # The daemon's life.

    async def _start_daemon(self) -> None:
        first = self._daemon is None
        self._daemon = daemon = await Daemon.start(self._identity, self._config)
        async with asyncio.timeout(START_SECONDS):
            places = best_first(await daemon.addresses())
            self._keep_port(places)
            self._addresses = tuple(f"{place}/p2p/{self.peer}" for place in (*places, *self._config.relayed))
            connected = await self._connect(daemon)
            if first and self._initial and not connected:
                raise _nobody_answers(self._initial)
            if self._attach is not None:
                await self._attach(daemon, connected)
            if self._handler is not None:
                await daemon.handle(PROTOCOL, self._accept)
        self._up.set()

    def _keep_port(self, places: Sequence[str]) -> None:
        """A port that the system chose is ours from now on: others know us by it."""
        ports = {port for place in places if (port := port_of(place))}
        if len(ports) == 1 and not self._config.announce:
            listen = tuple(f"{place.rpartition('/')[0]}/{min(ports)}" for place in self._config.listen)
            self._config = replace(self._config, listen=listen)

    async def _connect(self, daemon: Daemon) -> list[str]:
        """Dial the initial peers and, after a restart, those we have met. Returns who answered."""

        async def dial(peer: str, addresses: Sequence[str]) -> str | None:
            try:
                async with asyncio.timeout(DIAL_SECONDS):
                    await daemon.connect(peer, addresses)
            except (DaemonFailed, TimeoutError) as failure:
                logger.debug("%s cannot be reached: %s", peer, failure)
                return None
            return peer

        places = {peer: where for peer, where in (self._met | self._initial).items() if peer != self.peer}
        answers = await asyncio.gather(*(dial(peer, addresses) for peer, addresses in places.items()))
        return [peer for peer in answers if peer is not None]

    async def _supervise(self) -> None:
        """Start the daemon again whenever it dies, as long as this transport lives."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            assert self._daemon is not None
            started = loop.time()
            await self._daemon.closed.wait()
            self._up.clear()
            logger.warning("the libp2p daemon died; starting it again")
            failures = 0 if loop.time() - started > STABLE_SECONDS else failures + 1
            while not self._up.is_set():
                await asyncio.sleep(RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)])
                try:
                    await self._daemon.stop()
                    await self._start_daemon()
                except (OSError, SwarmError) as failure:
                    failures += 1
                    logger.warning("the libp2p daemon does not start: %s", failure or "it does not answer")
                except Exception:  # of hivemind's, or ours: without a next attempt this peer is deaf for ever
                    failures += 1
                    logger.exception("the libp2p daemon does not start")

    # What peers open.

    def _accept(self, peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        handler = self._handler
        crowded = self._accepted[peer] >= MAX_STREAMS_PER_PEER or self._accepted.total() >= MAX_STREAMS
        if handler is None or self._closed or crowded:
            logger.debug("a stream of %s is refused", peer)
            writer.close()
            return
        self._accepted[peer] += 1
        stream = Libp2pStream(peer, reader, writer, unfinished=self._unfinished)
        task = asyncio.create_task(self._serve(handler, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, handler: StreamHandler, stream: Libp2pStream) -> None:
        try:
            await handler(stream)
        except StreamBroken as broken:
            logger.debug("%s", broken)
        except Exception as failure:
            logger.warning("a stream of %s failed: %r", stream.peer, failure)
        finally:
            await stream.close()
            self._accepted[stream.peer] -= 1
            if not self._accepted[stream.peer]:
                del self._accepted[stream.peer]


def _nobody_answers(initial: dict[str, tuple[str, ...]]) -> BootstrapFailed:
    tried = ", ".join(address for addresses in initial.values() for address in addresses)
    hint = "is the swarm running, and can this machine reach that address and port?"
    return BootstrapFailed(f"no initial peer answers: {tried}", hint=hint)
