"""The libp2p daemon: a child process that dials, listens and encrypts, asked over a Unix socket.

hivemind ships it (`p2pd`) and its messages. We start it ourselves, because it must outlive a Ctrl-C (we say goodbye
through it) and must not outlive us, whatever ends us: a shell reads a pipe that only we hold, and ends the daemon when
the pipe ends. That needs no signal handler, no `preexec_fn` and no Linux.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hivemind import hivemind_cli
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from shoal.net.addresses import decode, encode
from shoal.net.identity import Identity, peer_id_of, peer_id_to_bytes
from shoal.net.libp2p.daemon_reasons import in_our_words

logger = logging.getLogger("shoal.net.libp2p.daemon")

START_SECONDS = 15.0
STOP_SECONDS = 5.0
READ_BUFFER_BYTES = 256 * 1024

# The daemon's end closes our pipe to its output, which is how we learn of it: the shell keeps no copy of that pipe.
_WATCHED = """
directory=$1; shift
"$@" </dev/null & exec >/dev/null 2>&1
read -r _
kill -TERM $!; wait; rm -rf "$directory"
"""

# hivemind logs to the terminal, and renames a level for the whole process, as soon as it is imported.
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.CRITICAL)
logging.addLevelName(logging.WARNING, "WARNING")

Accept = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], None]
"""Called with the id of a peer that opened a stream, and the stream."""


class DaemonFailed(OSError):
    """The daemon did not start, or could not do what it was asked."""


class DaemonGone(DaemonFailed):
    """The daemon does not answer: it is dead, or dying."""


@dataclass(frozen=True)
class DaemonConfig:
    """How the daemon takes part in the network.

    Without `listen` it only dials. `relays` carry the streams of a machine that cannot be dialled; `serve_relay` makes
    this one such a relay.
    """

    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    serve_relay: bool = False

    @property
    def reachable(self) -> bool:
        """Whether others dial this machine directly, so that it can keep a part of the directory."""
        return bool(self.listen) and not self.relays

    @property
    def relayed(self) -> tuple[str, ...]:
        """Where it is reached through its relays."""
        return tuple(f"{relay}/p2p-circuit" for relay in self.relays)

    def arguments(self) -> list[str]:
        # TCP only: the daemon's QUIC loses what was sent before a close. UPnP would open a port that nobody asked for.
        options: dict[str, object] = {
            "tls": 1,
            "natPortMap": 0,
            "autonat": 1,
            "connManager": 1,
            "relay": 1,
            "relayService": int(self.serve_relay),
            "dhtServer" if self.reachable else "dhtClient": 1,
        }
        if self.listen:
            options["hostAddrs"] = ",".join(self.listen)
        else:
            options["noListenAddrs"] = 1
        if self.announce:
            options["announceAddrs"] = ",".join(self.announce)
        if self.relays:
            options |= {"autoRelay": 1, "trustedRelays": ",".join(self.relays), "forceReachabilityPrivate": 1}
        elif self.serve_relay:
            options["forceReachabilityPublic"] = 1
        return [f"-{name}={value}" for name, value in options.items()]

    def environment(self) -> dict[str, str]:
        environment = dict(os.environ, GOLOG_LOG_LEVEL="error")
        if self.serve_relay:
            # With several threads the daemon races at its start between generous relay limits and 128 KiB.
            environment["GOMAXPROCS"] = "1"
        return environment


@dataclass
class Daemon:
    """A running daemon. `closed` is set when it has ended, for whatever reason."""

    process: asyncio.subprocess.Process
    directory: Path
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    _last_line: str = ""
    _reader: asyncio.Task[None] | None = None
    _servers: list[asyncio.Server] = field(default_factory=list)

    @classmethod
    async def start(cls, identity: Identity, config: DaemonConfig) -> Daemon:
        """Start it and wait until it answers. Raises `DaemonFailed`."""
        for address in config.listen:
            _check_free(address)
        try:
            directory = Path(tempfile.mkdtemp(prefix="shoal-"))
            key = directory / "identity"
            try:
                process = await _spawn(identity, config, directory, key)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        except OSError as failure:
            raise DaemonFailed(f"the libp2p daemon cannot be started: {failure}") from failure
        self = cls(process, directory)
        ready = asyncio.Event()
        self._reader = asyncio.create_task(self._read_output(ready))
        try:
            async with asyncio.timeout(START_SECONDS):
                await ready.wait()
            if self.closed.is_set():
                logger.debug("the libp2p daemon ended, and said last: %s", self._last_line)
                raise DaemonFailed("the libp2p daemon ended as soon as it was started")
        except TimeoutError:
            await self.stop()
            raise DaemonFailed(f"the libp2p daemon did not start in {START_SECONDS:.0f} s") from None
        except BaseException:
            await self.stop()
            raise
        key.unlink(missing_ok=True)
        return self

    @property
    def control(self) -> Any:
        """Where it is asked, as hivemind's own client wants it."""
        return Multiaddr(f"/unix{self.directory}/control")

    async def addresses(self) -> tuple[str, ...]:
        """Where it can be reached, without its peer id."""
        response, _, writer = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        writer.close()
        places = (decode(address) for address in response.identify.addrs)
        return tuple(place for place in places if place is not None)

    async def connect(self, peer: str, addresses: Sequence[str]) -> None:
        """Have a connection to a peer, dialled at these addresses if there is none. Raises `DaemonFailed`."""
        # Without the peer at their end, which is sent beside them.
        places = [encode(address.removesuffix(f"/p2p/{peer}")) for address in addresses]
        connect = p2pd_pb2.ConnectRequest(peer=peer_id_to_bytes(peer), addrs=places)
        _, _, writer = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))
        writer.close()

    async def open(self, peer: str, protocol: str) -> tuple[str | None, asyncio.StreamReader, asyncio.StreamWriter]:
        """A new stream to a peer, and the address where it was reached. Raises `DaemonFailed`."""
        stream_open = p2pd_pb2.StreamOpenRequest(peer=peer_id_to_bytes(peer), proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=stream_open)
        response, reader, writer = await self._ask(request)
        return decode(response.streamInfo.addr), reader, writer

    async def handle(self, protocol: str, accept: Accept) -> None:
        """Call `accept` for each stream that a peer opens. Raises `DaemonFailed`."""
        path = self.directory / "streams"

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            info = p2pd_pb2.StreamInfo()
            try:
                await read_pbmsg_safe(reader, info)
            except (OSError, EOFError, asyncio.CancelledError):
                writer.close()
                return
            accept(peer_id_of(info.peer), reader, writer)

        self._servers.append(await asyncio.start_unix_server(greet, path, limit=READ_BUFFER_BYTES))
        address = Multiaddr(f"/unix{path}").to_bytes()
        handler = p2pd_pb2.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=handler)
        _, _, writer = await self._ask(request)
        writer.close()

    async def stop(self) -> None:
        """End it, and leave nothing behind. May be called twice."""
        for server in self._servers:
            server.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            await self.process.wait()
        if self._reader is not None:
            await self._reader

    async def _ask(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """Its answer, and the connection, which for a stream becomes the stream."""
        try:
            reader, writer = await asyncio.open_unix_connection(self.directory / "control", limit=READ_BUFFER_BYTES)
        except OSError as failure:
            raise DaemonGone(f"the libp2p daemon is gone: {failure}") from None
        response = p2pd_pb2.Response()
        try:
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise DaemonFailed(in_our_words(response.error.msg))
        except (ConnectionError, EOFError) as failure:
            writer.close()
            raise DaemonGone(f"the libp2p daemon is gone: {failure}") from None
        except BaseException:
            writer.close()
            raise
        return response, reader, writer

    async def _read_output(self, ready: asyncio.Event) -> None:
        assert self.process.stdout is not None
        try:
            async for line in self.process.stdout:
                self._last_line = line.decode(errors="replace").strip() or self._last_line
                logger.debug("%s", self._last_line)
                if self._last_line.startswith("Peer ID:"):
                    ready.set()
        except ValueError:  # a line without end
            logger.debug("the daemon's output is not read any longer")
        self.closed.set()
        ready.set()


async def _spawn(identity: Identity, config: DaemonConfig, directory: Path, key: Path) -> asyncio.subprocess.Process:
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(identity.to_bytes())
    program = Path(hivemind_cli.__file__).with_name("p2pd")
    # In a session of its own, so that the terminal's Ctrl-C is for us alone.
    return await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", _WATCHED, "shoal-net", str(directory)),
        *(str(program), f"-listen=/unix{directory}/control", f"-id={key}", *config.arguments()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=config.environment(),
        start_new_session=True,
    )


def _check_free(address: str) -> None:
    """Raises `DaemonFailed` if another process listens there.

    The daemon would not notice: it shares ports, and of two daemons on one port each gets half of the streams.
    """
    _, version, host, _, port = address.split("/")
    with socket.socket(socket.AF_INET6 if version == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as failure:
            raise DaemonFailed(f"{host} port {port}: {failure.strerror}") from None
