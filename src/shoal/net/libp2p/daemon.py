"""The libp2p daemon: a child process that dials, listens and encrypts, and takes requests over a Unix socket.

hivemind ships the daemon (`p2pd`) and its messages. shoal starts it itself, for two reasons. It must outlive a Ctrl-C,
because the server says goodbye through it. It must not outlive this process, not even after a SIGKILL: a shell reads a
pipe that only this process holds, and ends the daemon when the pipe ends. That needs no signal handler, no `preexec_fn`
and no feature of Linux.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
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

from shoal.net.addressing.addresses import decode, encode
from shoal.net.identity import Identity, peer_id_of, peer_id_to_bytes, public_key
from shoal.net.libp2p.daemon_reasons import plain_reason

logger = logging.getLogger("shoal.net.libp2p.daemon")

START_SECONDS = 15.0
"""How long the daemon may take to start."""
STOP_SECONDS = 5.0
"""How long the daemon may take to end before it is killed."""
MAX_CIRCUITS = 128
"""The connections that a relay carries for one peer. Each client of a server needs one."""
MAX_RESERVATIONS = 128
"""The peers for which a relay carries connections."""
READ_BUFFER_BYTES = 256 * 1024
"""The buffer of each stream between this process and the daemon."""

# The end of the daemon closes the pipe of its output, which this process notices: the shell keeps no copy of that pipe.
_WATCH_SCRIPT = """
directory=$1; shift
"$@" </dev/null & exec >/dev/null 2>&1
read -r _
kill -TERM $!; wait; rm -rf "$directory"
"""

# Importing hivemind makes it log to the terminal, and renames a level for the whole process. This undoes both.
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.CRITICAL)
logging.addLevelName(logging.WARNING, "WARNING")

_ANSWERED = re.compile(r"peer id mismatch: expected \w+, but remote key matches (\w+)")

OnStream = Callable[[str, str | None, asyncio.StreamReader, asyncio.StreamWriter], None]
"""Called with the id of the peer that opened a stream, its address, and the stream."""


class DaemonFailed(OSError):
    """The daemon did not start, or could not carry out a request. `report` is what the daemon itself says of it."""

    def __init__(self, reason: str, *, report: str = "") -> None:
        super().__init__(reason)
        self.report = report


class DaemonGone(DaemonFailed):
    """The daemon does not answer: it has ended, or is ending."""


@dataclass(frozen=True)
class DaemonConfig:
    """The daemon's part in the network, by multiaddresses.

    Without `listen` it only dials. `announce` replaces the addresses that other peers learn. `serve_relay` makes this
    daemon carry the streams of machines that cannot be dialled. One that `is_behind_nat` cannot be dialled itself:
    where it can, it makes relayed connections direct. With `punches_holes` off, relayed connections stay as they are.
    """

    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    serve_relay: bool = False
    is_behind_nat: bool = False
    punches_holes: bool = True

    @property
    def is_dialled(self) -> bool:
        """Whether other peers dial this one directly, so that it can store records of the directory."""
        return bool(self.listen) and not self.is_behind_nat

    def arguments(self) -> list[str]:
        """The daemon's command-line options."""
        # TCP only: over QUIC the daemon loses data that was sent before a close. No UPnP: it would open a port of the
        # router without being asked to. Places at relays are reserved elsewhere (`shoal.net.libp2p.reach`).
        options: dict[str, object] = {
            "tls": 1,
            "natPortMap": 0,
            "autonat": int(self.punches_holes),
            "connManager": 1,
            "relay": 1,
            "relayService": int(self.serve_relay),
            "dhtServer" if self.is_dialled else "dhtClient": 1,
        }
        if self.serve_relay:
            options |= {"relayMaxCircuits": MAX_CIRCUITS, "relayMaxReservations": MAX_RESERVATIONS}
        if self.listen:
            options["hostAddrs"] = ",".join(self.listen)
        else:
            options["noListenAddrs"] = 1
        if self.announce:
            options["announceAddrs"] = ",".join(self.announce)
        if self.is_behind_nat:
            options["forceReachabilityPrivate"] = 1
        elif self.serve_relay:
            options["forceReachabilityPublic"] = 1
        return [f"-{name}={value}" for name, value in options.items()]

    def environment(self) -> dict[str, str]:
        """The daemon's environment variables."""
        environment = dict(os.environ, GOLOG_LOG_LEVEL="error")
        if self.serve_relay:
            # Usually wins the race between the daemon's two relays (`shoal.net.libp2p.reach.relay_daemon`).
            environment["GOMAXPROCS"] = "1"
        return environment


@dataclass
class Daemon:
    """A running daemon. `closed` is set when it has ended, for any reason. Make it with `start`, end it with `stop`."""

    process: asyncio.subprocess.Process
    directory: Path
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    _last_line: str = ""
    _reader: asyncio.Task[None] | None = None
    _servers: list[asyncio.Server] = field(default_factory=list)

    @classmethod
    async def start(cls, identity: Identity, config: DaemonConfig) -> Daemon:
        """Start a daemon and wait until it answers. Raises `DaemonFailed`."""
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
                logger.debug("the libp2p daemon ended; its last line was: %s", self._last_line)
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
        """The address of its Unix socket, for hivemind's own client."""
        return Multiaddr(f"/unix{self.directory}/control")

    async def addresses(self) -> tuple[str, ...]:
        """The addresses that it listens on, without its peer id. Raises `DaemonFailed`."""
        response, _, writer = await self._request(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        writer.close()
        decoded = (decode(address) for address in response.identify.addrs)
        return tuple(address for address in decoded if address is not None)

    async def connections(self) -> list[tuple[str, str | None]]:
        """The connections: each peer with its address there, which is `None` if shoal does not know its form.

        Raises `DaemonFailed`.
        """
        response, _, writer = await self._request(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        writer.close()
        return [(peer_id_of(peer.id), decode(address)) for peer in response.peers for address in peer.addrs]

    async def connect(self, peer: str, addresses: Sequence[str]) -> None:
        """Connect to a peer at these addresses, unless it is connected. Raises `DaemonFailed`."""
        # The peer id at their end is a field of its own.
        encoded = [encode(address.removesuffix(f"/p2p/{peer}")) for address in addresses]
        connect = p2pd_pb2.ConnectRequest(peer=peer_id_to_bytes(peer), addrs=encoded)
        _, _, writer = await self._request(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))
        writer.close()

    async def peer_at(self, address: str) -> str:
        """The id of the peer that answers at an address without one. Raises `DaemonFailed` if none does.

        libp2p dials only a peer whose id it knows. So a peer is dialled that does not exist, and the daemon reports
        which one answered in its place, after that one has proved its id.
        """
        missing = Identity.temporary().peer
        try:
            await self.connect(missing, [address])
        except DaemonFailed as failure:
            found = _ANSWERED.search(failure.report)
            if found is None or public_key(found[1]) is None:
                raise
            return found[1]
        raise DaemonFailed("the daemon connected to a peer that does not exist")

    async def open(self, peer: str, protocol: str) -> tuple[str | None, asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a peer. Returns the address of the peer on this connection, and the stream.

        Raises `DaemonFailed`.
        """
        stream_open = p2pd_pb2.StreamOpenRequest(peer=peer_id_to_bytes(peer), proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=stream_open)
        response, reader, writer = await self._request(request)
        return decode(response.streamInfo.addr), reader, writer

    async def chosen_protocol(self, peer: str, protocols: Sequence[str]) -> str:
        """The first of these protocols that a peer speaks. Raises `DaemonFailed` if it speaks none of them."""
        stream_open = p2pd_pb2.StreamOpenRequest(peer=peer_id_to_bytes(peer), proto=list(protocols))
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=stream_open)
        response, _, writer = await self._request(request)
        writer.close()
        return str(response.streamInfo.proto)

    async def handle(self, protocol: str, on_stream: OnStream) -> None:
        """Call `on_stream` for each stream of this protocol that a peer opens. Raises `DaemonFailed`."""
        path = self.directory / f"streams-{len(self._servers)}"

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            info = p2pd_pb2.StreamInfo()
            try:
                await read_pbmsg_safe(reader, info)
            except (OSError, EOFError, asyncio.CancelledError):
                writer.close()
                return
            on_stream(peer_id_of(info.peer), decode(info.addr), reader, writer)

        self._servers.append(await asyncio.start_unix_server(accept, path, limit=READ_BUFFER_BYTES))
        address = Multiaddr(f"/unix{path}").to_bytes()
        handler = p2pd_pb2.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=handler)
        _, _, writer = await self._request(request)
        writer.close()

    async def stop(self) -> None:
        """End it, and remove its files. May be called twice."""
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

    async def _request(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """The answer to a request, and the connection, which becomes the stream if the request opens one."""
        try:
            reader, writer = await asyncio.open_unix_connection(self.directory / "control", limit=READ_BUFFER_BYTES)
        except OSError as failure:
            raise DaemonGone(f"the libp2p daemon is gone: {failure}") from None
        response = p2pd_pb2.Response()
        try:
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise DaemonFailed(plain_reason(response.error.msg), report=response.error.msg)
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
        except ValueError:  # a line that is too long
            logger.debug("the output of the libp2p daemon is no longer read")
        self.closed.set()
        ready.set()


async def _spawn(identity: Identity, config: DaemonConfig, directory: Path, key: Path) -> asyncio.subprocess.Process:
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(identity.to_bytes())
    program = Path(hivemind_cli.__file__).with_name("p2pd")
    # In a session of its own, so that it does not receive the terminal's Ctrl-C.
    return await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", _WATCH_SCRIPT, "shoal-net", str(directory)),
        *(str(program), f"-listen=/unix{directory}/control", f"-id={key}", *config.arguments()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=config.environment(),
        start_new_session=True,
    )


def _check_free(address: str) -> None:
    """Raise `DaemonFailed` if another process listens on this address.

    The daemon would not notice that: it shares ports, and two daemons on one port would each get half of the streams.
    """
    _, version, host, _, port = address.split("/")
    with socket.socket(socket.AF_INET6 if version == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version == "ip6":  # the daemon listens on IPv4 by another socket
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as failure:
            raise DaemonFailed(f"{host} port {port}: {failure.strerror}") from None
