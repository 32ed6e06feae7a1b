"""`Transport` on the libp2p daemon, which is restarted when it dies."""

from __future__ import annotations

import asyncio
import logging
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from shoal.errors import BootstrapFailed, SwarmError
from shoal.net.addressing.addresses import group_by_peer, most_useful_first, peer_of, port_of
from shoal.net.addressing.own_addresses import bridge_hosts
from shoal.net.handler_tasks import HandlerTasks
from shoal.net.identity import Identity, public_key, verify
from shoal.net.libp2p.daemon import START_SECONDS, Daemon, DaemonConfig, DaemonFailed, DaemonGone
from shoal.net.libp2p.daemon_reasons import NO_PROTOCOL
from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.libp2p.membership import Membership
from shoal.net.libp2p.reach.reach_keeper import ReachKeeper
from shoal.net.libp2p.reach.relay_daemon import start_daemon
from shoal.net.libp2p.spoken_version import check_versions, spoken_version
from shoal.net.lines import Lines
from shoal.net.swarm_key import SwarmKey
from shoal.net.transport import RelayTrial, StreamBroken, StreamHandler
from shoal.net.wire.receive_budget import ReceiveBudget
from shoal.policy.network.reachability import Reach
from shoal.protocol import PROTOCOL, PROTOCOL_VERSION, REACH_PROTOCOL, UPGRADE, speaks_other

logger = logging.getLogger(__name__)

OPEN_SECONDS = 10.0
"""How long opening a stream may take, a restart of the daemon included."""
RELAY_SECONDS = 10.0
"""How long the start waits for relays, if there have to be any. They are looked for all the time."""
DIAL_SECONDS = 8.0
"""How long connecting to one initial peer may take; all are dialled at once."""
STABLE_SECONDS = 60.0
"""A daemon that lived this long died by accident, and the pauses between restarts begin anew."""
EXIT_SECONDS = 1.0
"""How long a daemon that does not answer any more may take to end."""
FLUSH_SECONDS = 0.2
"""The time in which the daemon sends what it has accepted, before it is ended."""
RESTART_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The pauses between attempts to restart the daemon; the last one is repeated."""
MAX_DIALLED_PEERS = 256
"""Peers whose addresses are remembered, to connect to them after a restart of the daemon."""


class Libp2pTransport:
    """Starts the daemon, restarts it when it dies, and ends it.

    `attach` is called with every daemon that is started, the ids of the peers that it is connected to, and whether
    others dial it, before any stream is opened or accepted through it. `relays` are those that the operator chose.
    `start` the transport, and `close` it, which also ends its tasks.
    """

    def __init__(
        self,
        identity: Identity,
        config: DaemonConfig,
        *,
        initial_peers: Sequence[str] = (),
        relays: Sequence[str] = (),
        attach: Callable[[Daemon, Sequence[str], bool], Awaitable[None]] | None = None,
        swarm_key: SwarmKey | None = None,
    ) -> None:
        self._identity = identity
        self._config = config
        self._attach = attach
        self._membership = Membership(identity.peer, swarm_key)
        self._initial = group_by_peer(initial_peers)
        self._dialled: dict[str, tuple[str, ...]] = {}
        self._daemon: Daemon | None = None
        self._up = asyncio.Event()
        self._own: tuple[str, ...] = ()  # its direct addresses, the most useful first
        self._reach: ReachKeeper | None = None
        if config.listen:
            self._reach = ReachKeeper(
                identity.peer,
                known=self._known,
                own=lambda: self._own,
                named=relays,
                offers_relay=config.serve_relay,
            )
        self._handler: StreamHandler | None = None
        self._budget = ReceiveBudget()
        self._lines = Lines()
        self._handlers = HandlerTasks()
        self._streams: set[Libp2pStream] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def peer(self) -> str:
        return self._identity.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return (*self.reach.relayed, *self._own)

    @property
    def reach(self) -> Reach:
        return Reach() if self._reach is None else self._reach.reach

    async def reach_other_than(self, last: Reach) -> Reach:
        if self._reach is None:
            await asyncio.Event().wait()
            raise AssertionError("nothing sets this event")
        return await self._reach.other_than(last)

    def sign(self, data: bytes) -> bytes:
        return self._identity.sign(data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        return verify(peer, data, signature)

    async def try_relays(self) -> tuple[RelayTrial, ...]:
        """What the relays do for this peer that it could have."""
        return () if self._reach is None else await self._reach.try_relays()

    async def start(self) -> None:
        """Start the daemon and connect to the initial peers.

        Raises `BootstrapFailed` if there are initial peers and none answers, or none speaks this version of the
        protocol and some another, and `SwarmError` if the daemon does not start.
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
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                address, reader, writer = await self._dial(peer, hints)
        except TimeoutError:
            raise StreamBroken(f"{peer} did not answer within {OPEN_SECONDS:.0f} s") from None
        except DaemonFailed as failure:
            raise StreamBroken(f"{peer} cannot be reached: {failure}") from None
        if hints and (peer in self._dialled or len(self._dialled) < MAX_DIALLED_PEERS):
            self._dialled[peer] = hints
        stream = Libp2pStream(
            peer,
            reader,
            writer,
            address=address,
            line=self._lines.of_stream(peer),
            budget=self._budget,
            on_close=self._streams.discard,
        )
        self._streams.add(stream)
        try:
            await self._membership.prove(stream)
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _dial(self, peer: str, hints: Sequence[str]) -> tuple[str | None, StreamReader, StreamWriter]:
        """A raw stream, from the present daemon or, if that is ending, from the next one."""
        while True:
            await self._up.wait()
            daemon = self._daemon
            assert daemon is not None
            try:
                if hints:
                    await daemon.connect(peer, hints)
                return await self._stream_of(daemon, peer)
            except DaemonGone:
                async with asyncio.timeout(EXIT_SECONDS):
                    await daemon.closed.wait()
                if self._daemon is daemon:
                    self._up.clear()

    @staticmethod
    async def _stream_of(daemon: Daemon, peer: str) -> tuple[str | None, StreamReader, StreamWriter]:
        try:
            return await daemon.open(peer, PROTOCOL)
        except DaemonFailed as failure:
            version = await spoken_version(daemon, peer) if NO_PROTOCOL in failure.report else None
            if version in (None, PROTOCOL_VERSION):
                raise
            raise DaemonFailed(f"it {speaks_other(version)}; {UPGRADE}") from None

    async def listen(self, handler: StreamHandler) -> None:
        first = self._handler is None
        self._handler = handler
        if first and self._daemon is not None and self._up.is_set():
            try:
                await self._daemon.handle(PROTOCOL, self._accept)
            except DaemonFailed as failure:  # the next daemon is given the handler when it starts
                logger.warning("streams are accepted when the libp2p daemon has been restarted: %s", failure)

    async def close(self) -> None:
        self._closed = True
        had_streams = bool(self._streams or len(self._handlers) or self._supervisor)
        self._handlers.cancel()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._handlers.wait()
        for stream in [*self._streams]:
            await stream.close()
        if self._reach is not None:
            await self._reach.close()
        if self._daemon is not None:
            if had_streams and not self._daemon.closed.is_set():
                await asyncio.sleep(FLUSH_SECONDS)
            await self._daemon.stop()

    # The daemon.

    async def _start_daemon(self) -> None:
        first = self._daemon is None
        connected = await self._run_daemon()
        if first and self._initial and not connected:
            raise _bootstrap_failed(self._initial)
        if first:
            assert self._daemon is not None
            await check_versions(self._daemon, connected)
        if first and self._reach is not None and not self._config.is_behind_nat:
            await self._reach.examine()
            if self._reach.is_behind_nat:  # nothing depends on the daemon yet
                assert self._daemon is not None
                await self._daemon.stop()
                connected = await self._run_daemon()
        daemon = self._daemon
        assert daemon is not None
        if self._attach is not None:
            await self._attach(daemon, connected, self._config.is_dialled)
        if self._handler is not None:
            await daemon.handle(PROTOCOL, self._accept)
        if first and self._reach is not None:
            await self._reach.start(seconds=RELAY_SECONDS)
        self._up.set()

    async def _run_daemon(self) -> list[str]:
        """Start a daemon. Returns the peers that it is connected to."""
        if self._reach is not None:
            self._config = replace(self._config, is_behind_nat=self._reach.is_behind_nat)
        self._daemon = daemon = await start_daemon(self._identity, self._config)
        async with asyncio.timeout(START_SECONDS):
            own = await daemon.addresses()
            self._keep_port(own)
            ordered = most_useful_first(own, bridges=bridge_hosts())
            self._own = tuple(f"{address}/p2p/{self.peer}" for address in ordered)
            connected = await self._connect(daemon)
            if self._reach is not None:
                self._reach.attach(daemon)
                await daemon.handle(REACH_PROTOCOL, self._accept_examined)
        return connected

    def _known(self) -> dict[str, tuple[str, ...]]:
        """The peers that answered, or are to, and their addresses."""
        peers = self._dialled.keys() | self._initial.keys()
        both = {peer: (*self._dialled.get(peer, ()), *self._initial.get(peer, ())) for peer in peers}
        return {peer: tuple(dict.fromkeys(addresses)) for peer, addresses in both.items()}

    def _keep_port(self, addresses: Sequence[str]) -> None:
        """Use the port that the system chose after a restart too: other peers know this one by it."""
        ports = {port for address in addresses if (port := port_of(address))}
        if len(ports) == 1 and not self._config.announce:
            listen = tuple(f"{address.rpartition('/')[0]}/{min(ports)}" for address in self._config.listen)
            self._config = replace(self._config, listen=listen)

    async def _connect(self, daemon: Daemon) -> list[str]:
        """Connect to the initial peers and, after a restart, to those dialled before. Returns the ones that answer."""

        async def dial(peer: str, addresses: Sequence[str]) -> str | None:
            try:
                async with asyncio.timeout(DIAL_SECONDS):
                    await daemon.connect(peer, addresses)
            except (DaemonFailed, TimeoutError) as failure:
                logger.debug("%s cannot be reached: %s", peer, failure)
                return None
            return peer

        others = {peer: addresses for peer, addresses in (self._dialled | self._initial).items() if peer != self.peer}
        answers = await asyncio.gather(*(dial(peer, addresses) for peer, addresses in others.items()))
        return [peer for peer in answers if peer is not None]

    async def _supervise(self) -> None:
        """Restart the daemon whenever it dies, until this transport closes."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            assert self._daemon is not None
            started = loop.time()
            await self._daemon.closed.wait()
            self._up.clear()
            logger.warning("the libp2p daemon died; restarting it")
            failures = 0 if loop.time() - started > STABLE_SECONDS else failures + 1
            while not self._up.is_set():
                await asyncio.sleep(RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)])
                try:
                    await self._daemon.stop()
                    await self._start_daemon()
                except (OSError, SwarmError) as failure:
                    failures += 1
                    logger.warning("the libp2p daemon does not start: %s", failure or "it does not answer")
                except Exception:  # also a bug in hivemind or here: without another attempt this peer stays offline
                    failures += 1
                    logger.exception("the libp2p daemon does not start")

    # The streams that other peers open.

    def _accept(self, peer: str, address: str | None, reader: StreamReader, writer: StreamWriter) -> None:
        handler = None if self._handler is None else self._membership.required_by(self._handler)
        self._handle(handler, peer, address, reader, writer)

    def _accept_examined(self, peer: str, address: str | None, reader: StreamReader, writer: StreamWriter) -> None:
        self._handle(None if self._reach is None else self._reach.examiner, peer, address, reader, writer)

    def _handle(
        self, handler: StreamHandler | None, peer: str, address: str | None, reader: StreamReader, writer: StreamWriter
    ) -> None:
        if handler is None or self._closed:
            logger.debug("a stream of %s is refused", peer)
            writer.close()
            return
        line = self._lines.of_stream(peer)
        stream = Libp2pStream(peer, reader, writer, address=address, line=line, budget=self._budget)
        self._handlers.start(handler, stream)


def _bootstrap_failed(initial: dict[str, tuple[str, ...]]) -> BootstrapFailed:
    tried = ", ".join(address for addresses in initial.values() for address in addresses)
    hint = "is the swarm running, and can this machine reach that address and port?"
    return BootstrapFailed(f"no initial peer answers: {tried}", hint=hint)
