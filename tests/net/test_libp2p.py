"""The real network, on loopback: real daemons, real processes, real deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import pytest
from hivemind import p2p as p2p_module
from hivemind.dht import node as node_module
from hivemind.p2p import P2PHandlerError
from hivemind.proto import dht_pb2

from shoal.errors import BootstrapFailed, SwarmError, UserError
from shoal.net import NetworkConfig, join
from shoal.net.identity import Identity
from shoal.net.libp2p import daemon as daemons
from shoal.net.libp2p.daemon import DaemonConfig
from shoal.net.libp2p.hash_table.dht_directory import DhtDirectory
from shoal.net.libp2p.libp2p_transport import Libp2pTransport
from shoal.net.records import Announcement, seal, shard_key
from shoal.net.transport import Node, Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.census.levels import Shard
from shoal.policy.network.stream_room import MAX_STREAMS_PER_PEER
from shoal.protocol import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, PROTOCOL, Failure, ProtocolViolation
from shoal.spans import Span
from shoal.testing.shaped_servers import wait_until_stopped

from .. import server_infos

pytestmark = pytest.mark.anyio

MODEL = ModelInfo(key="m" * 32, name="org/tiny", family="llama", num_blocks=8)
PATIENCE = 30.0
"""No step below takes this long; a test that waits for it has failed."""


@asynccontextmanager
async def swarm(*members: NetworkConfig) -> AsyncIterator[list[Node]]:
    """A node, and others that join through it. The context times out after `PATIENCE`."""
    async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
        first = await stack.enter_async_context(join(NetworkConfig(host="127.0.0.1")))
        nodes = [first]
        for member in members:
            config = NetworkConfig(
                initial_peers=first.transport.addresses, host="127.0.0.1", client_mode=member.client_mode
            )
            nodes.append(await stack.enter_async_context(join(config)))
        yield nodes


SERVER = NetworkConfig()
CLIENT = NetworkConfig(client_mode=True)


async def echo(stream: Stream) -> None:
    while True:
        header, payload = await stream.receive()
        await stream.send(header, [payload])


def info(node: Node, start: int, end: int, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    """What this node announces."""
    return server_infos.info(node.transport.peer, start, end, state, addresses=node.transport.addresses)


def daemons_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children(recursive=True) if child.name() == "p2pd"]


@dataclass
class Remote:
    """A peer in another process."""

    process: asyncio.subprocess.Process
    address: str

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]


@asynccontextmanager
async def remote() -> AsyncIterator[Remote]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.net.peer"), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    children: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        children = daemons_of(process.pid)
        yield Remote(process, address)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        for child in children:
            if child.is_running():
                await asyncio.to_thread(child.wait, PATIENCE)


@asynccontextmanager
async def foreign_daemon(victim: Node) -> AsyncIterator[tuple[Any, Identity]]:
    """A daemon without shoal's protocols, connected to the victim."""
    identity = Identity.temporary()
    daemon = await daemons.Daemon.start(identity, daemons.DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",)))
    try:
        await daemon.connect(victim.transport.peer, victim.transport.addresses)
        yield daemon, identity
    finally:
        await daemon.stop()


@pytest.mark.parametrize("size", [0, 16 * 1024, 8 * 1024 * 1024])
async def test_frames_are_echoed_and_the_peer_is_authenticated(size: int) -> None:
    payload = os.urandom(size)
    async with swarm(CLIENT) as (server, client):
        callers = []

        async def handler(stream: Stream) -> None:
            callers.append(stream.peer)
            await echo(stream)

        await server.transport.listen(handler)
        stream = await client.transport.open(server.transport.peer)
        for _ in range(3):
            await stream.send(b"header", [payload[:100], memoryview(payload)[100:]])
            assert await stream.receive() == (b"header", bytearray(payload))
        assert callers == [client.transport.peer]
        assert stream.peer == server.transport.peer


async def test_a_frame_beyond_the_limits_is_neither_sent_nor_received() -> None:
    async with swarm() as (server,), foreign_daemon(server) as (daemon, _):
        failures: asyncio.Queue[str] = asyncio.Queue()

        async def handler(stream: Stream) -> None:
            with pytest.raises(StreamBroken) as broken:
                await stream.receive()
            failures.put_nowait(str(broken.value))

        await server.transport.listen(handler)
        for header, payload in (MAX_HEADER_BYTES + 1, 0), (0, MAX_PAYLOAD_BYTES + 1), (2**32 - 1, 2**64 - 1):
            _, reader, writer = await daemon.open(server.transport.peer, PROTOCOL)
            writer.write(header.to_bytes(4, "big") + payload.to_bytes(8, "big"))
            assert await reader.read() == b""
            assert "of" in await failures.get()
            writer.close()


async def test_a_sender_refuses_a_frame_that_is_too_large() -> None:
    async with swarm(CLIENT) as (server, client):
        await server.transport.listen(echo)
        stream = await client.transport.open(server.transport.peer)
        with pytest.raises(ProtocolViolation):
            await stream.send(bytes(MAX_HEADER_BYTES + 1))
        await stream.send(b"the stream is still good")
        assert (await stream.receive())[0] == b"the stream is still good"


@pytest.mark.parametrize("sent", [b"", b"\0\0", bytes(3) + b"\5" + bytes(8) + b"head", bytes(11) + b"\5" + b"body"])
async def test_a_frame_that_is_cut_short_is_a_broken_stream(sent: bytes) -> None:
    async with swarm() as (server,), foreign_daemon(server) as (daemon, _):
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def handler(stream: Stream) -> None:
            try:
                await stream.receive()
            except StreamBroken:
                outcome.set_result("broken")

        await server.transport.listen(handler)
        _, _, writer = await daemon.open(server.transport.peer, PROTOCOL)
        writer.write(sent)
        await writer.drain()
        writer.close()
        assert await outcome == "broken"


async def test_a_peer_that_is_absent_or_does_not_listen_cannot_be_reached() -> None:
    async with swarm(CLIENT) as (server, client):
        unknown, nowhere = Identity.temporary().peer, "/ip4/127.0.0.1/tcp/9/p2p/"
        for peer, why in (
            (server.transport.peer, "cannot be reached: it takes no streams of shoal"),
            (unknown, "cannot be reached: its address is not known"),
            (unknown, "cannot be reached: nothing listens there"),
            ("nonsense", "not a peer id: 'nonsense'"),
        ):
            with pytest.raises(StreamBroken, match=f"{why}$"):
                await client.transport.open(peer, [nowhere + peer] if "listens" in why else [])


async def test_a_peer_of_another_swarm_is_reached_by_its_address() -> None:
    async with swarm() as (one,), swarm() as (other,):
        await other.transport.listen(echo)
        foreign = one.transport.addresses
        stream = await one.transport.open(other.transport.peer, [*foreign, "nonsense", *other.transport.addresses])
        await stream.send(b"hello")
        assert (await stream.receive())[0] == b"hello"


async def test_a_dead_process_is_noticed_and_its_daemon_ends() -> None:
    async with asyncio.timeout(PATIENCE), remote() as server:
        orphans = daemons_of(server.process.pid)
        assert len(orphans) == 1
        async with join(NetworkConfig(initial_peers=(server.address,), client_mode=True)) as client:
            stream = await client.transport.open(server.peer)
            await stream.send(b"alive?")
            assert (await stream.receive())[0] == b"alive?"
            server.process.send_signal(signal.SIGKILL)
            with pytest.raises(StreamBroken):
                await stream.receive()
        await asyncio.to_thread(orphans[0].wait, PATIENCE)


async def test_ctrl_c_leaves_the_network_up_for_a_goodbye() -> None:
    async with asyncio.timeout(PATIENCE), remote() as server:
        async with join(NetworkConfig(initial_peers=(server.address,), client_mode=True)) as client:
            stream = await client.transport.open(server.peer)
            await stream.send(b"alive?")
            assert (await stream.receive())[0] == b"alive?"
            os.killpg(server.process.pid, signal.SIGINT)
            assert (await stream.receive())[0] == b"goodbye"
        assert await server.process.wait() == 0


async def test_what_was_sent_before_a_transport_closes_still_arrives() -> None:
    async with swarm() as (server,):
        received: asyncio.Queue[int] = asyncio.Queue()

        async def handler(stream: Stream) -> None:
            while True:
                received.put_nowait(len((await stream.receive())[1]))

        await server.transport.listen(handler)
        async with join(NetworkConfig(initial_peers=server.transport.addresses, client_mode=True)) as client:
            stream = await client.transport.open(server.transport.peer)
            for size in range(20):
                await stream.send(b"", [bytes(size * 1000)])
        assert [await received.get() for _ in range(20)] == [size * 1000 for size in range(20)]


async def test_a_daemon_that_dies_is_restarted_with_the_same_identity_and_port() -> None:
    async with swarm(SERVER, CLIENT) as (first, server, client):
        await server.transport.listen(echo)
        await first.transport.listen(echo)
        await server.directory.announce(MODEL, info(server, 0, 4), lifetime=60)
        addresses = server.transport.addresses
        port = addresses[0].split("/")[4]
        (daemon,) = (one for one in daemons_of(os.getpid()) if _listens_on(one, int(port)))
        stream = await client.transport.open(server.transport.peer)
        daemon.kill()
        with pytest.raises(StreamBroken):
            await stream.receive()
        # Opened by the server itself, this waits until its daemon is back.
        outgoing = await server.transport.open(first.transport.peer)
        await outgoing.send(b"there?")
        assert (await outgoing.receive())[0] == b"there?"
        assert server.transport.addresses == addresses
        again = await client.transport.open(server.transport.peer, addresses)
        await again.send(b"back?")
        assert (await again.receive())[0] == b"back?"
        await server.directory.announce(MODEL, info(server, 4, 8), lifetime=60)
        assert await client.directory.servers(MODEL) == (info(server, 4, 8),)


@pytest.mark.parametrize("failure", [OSError("no more processes"), RuntimeError("a bug")])
async def test_a_daemon_is_restarted_even_after_an_attempt_that_failed(failure: Exception) -> None:
    attempts: list[daemons.Daemon] = []

    async def attach(daemon: daemons.Daemon, peers: Sequence[str], is_dialled: bool) -> None:
        attempts.append(daemon)
        if len(attempts) == 2:
            raise failure

    config = daemons.DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    transport = Libp2pTransport(Identity.temporary(), config, attach=attach)
    async with asyncio.timeout(PATIENCE), swarm() as (other,):
        await other.transport.listen(echo)
        await transport.start()
        try:
            await attempts[0].stop()
            stream = await transport.open(other.transport.peer, other.transport.addresses)
            await stream.send(b"back")
            assert (await stream.receive())[0] == b"back"
            assert len(attempts) == 3
        finally:
            await transport.close()


def _listens_on(process: psutil.Process, port: int) -> bool:
    return any(connection.laddr.port == port for connection in process.net_connections("tcp"))


async def test_joining_without_an_answer_names_the_addresses_that_were_tried() -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.temporary().peer}"
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(BootstrapFailed) as failure:
        async with asyncio.timeout(PATIENCE), join(NetworkConfig(initial_peers=(dead,), client_mode=True)):
            pass
    assert dead in str(failure.value)
    assert failure.value.hint
    assert set(psutil.Process().children(recursive=True)) <= before


async def test_one_initial_peer_that_answers_is_enough() -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.temporary().peer}"
    async with swarm() as (first,):
        await first.directory.announce(MODEL, info(first, 0, 8), lifetime=60)
        addresses = (dead, *first.transport.addresses)
        async with join(NetworkConfig(initial_peers=addresses, client_mode=True)) as client:
            assert await client.directory.servers(MODEL) == (info(first, 0, 8),)


async def test_a_peer_outside_of_a_swarm_cannot_be_joined() -> None:
    async with swarm() as (first,), foreign_daemon(first) as (daemon, identity):
        address = f"{(await daemon.addresses())[0]}/p2p/{identity.peer}"
        with pytest.raises(BootstrapFailed, match="not to a swarm"):
            async with join(NetworkConfig(initial_peers=(address,), client_mode=True)):
                pass


async def test_a_malformed_address_is_refused_before_the_daemon_starts() -> None:
    with pytest.raises(UserError) as error:
        async with join(NetworkConfig(initial_peers=("localhost:31337",))):
            pass
    assert "/ip4/" in (error.value.hint or "")


async def test_a_port_that_is_in_use_is_reported() -> None:
    async with swarm() as (first,):
        port = int(first.transport.addresses[0].split("/")[4])
        with pytest.raises(SwarmError) as failure:
            async with join(NetworkConfig(host="127.0.0.1", port=port)):
                pass
        assert "port" in (failure.value.hint or "")


async def test_a_stored_identity_gives_the_same_peer_id(tmp_path: Any) -> None:
    config = NetworkConfig(host="127.0.0.1", identity=tmp_path / "identity")
    async with asyncio.timeout(PATIENCE):
        async with join(config) as node:
            first = node.transport.peer
        async with join(config) as node:
            assert node.transport.peer == first == Identity.load_or_create(tmp_path / "identity").peer
            assert node.transport.addresses[0].endswith(first)


async def test_all_peers_see_announcements_and_a_goodbye_replaces_them() -> None:
    async with swarm(SERVER, SERVER, CLIENT) as (first, one, other, client):
        await one.directory.announce(MODEL, info(one, 0, 5), lifetime=60)
        await other.directory.announce(MODEL, info(other, 3, 8), lifetime=60)
        expected = sorted([info(one, 0, 5), info(other, 3, 8)], key=lambda server: server.peer)
        for node in first, client, one:
            assert list(await node.directory.servers(MODEL)) == expected
            assert await node.directory.models() == (MODEL,)
        await one.directory.announce(MODEL, info(one, 0, 5, ServerState.LEAVING), lifetime=5)
        await other.directory.announce(MODEL, info(other, 0, 3), lifetime=60)
        states = {server.peer: (server.state, server.span) for server in await client.directory.servers(MODEL)}
        assert states == {
            one.transport.peer: (ServerState.LEAVING, Span(0, 5)),
            other.transport.peer: (ServerState.ONLINE, Span(0, 3)),
        }


async def test_forged_announcements_are_not_seen_and_hide_no_server() -> None:
    async with swarm(SERVER, CLIENT) as (first, server, client), foreign_daemon(first) as (daemon, mallory):
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=30)
        p2p = await p2p_module.P2P.replicate(daemon.control)
        table = await node_module.DHTNode.create(p2p=p2p, initial_peers=[f"/p2p/{first.transport.peer}"])
        victim = server.transport.peer
        latest = Announcement.of(MODEL, info(server, 0, 8), expires=time.time() + 200).model_copy(
            update={"peer": mallory.peer}
        )
        own = seal(mallory, latest)
        forged = own.replace(mallory.peer.encode(), victim.encode())
        digest = node_module.DHTID.generate(shard_key(MODEL.key, Shard(0, 0, 0)))
        packed = [table.protocol.serializer.dumps(value) for value in (forged, own, b"", own, own)]
        subkeys = [victim, victim, victim, None, mallory.peer]
        for node in first, server:
            peer = p2p_module.PeerID.from_base58(node.transport.peer)
            expires = [latest.expires] * len(packed)
            for in_cache in False, True:
                stored = await table.protocol.call_store(peer, [digest] * 5, packed, expires, subkeys, in_cache)
                assert stored == [False, False, False, False, not in_cache]  # only its own record
        seen = {one.peer for one in await client.directory.servers(MODEL)}
        assert seen == {victim, mallory.peer}
        assert info(server, 0, 8) in await client.directory.servers(MODEL)
        await p2p.shutdown()


async def test_a_repeated_key_is_answered_once_and_the_directory_keeps_working() -> None:
    async with swarm(SERVER, CLIENT) as (first, server, client), foreign_daemon(first) as (daemon, _):
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=30)
        p2p = await p2p_module.P2P.replicate(daemon.control)
        table = await node_module.DHTNode.create(p2p=p2p, initial_peers=[f"/p2p/{first.transport.peer}"])
        key = node_module.DHTID.generate(shard_key(MODEL.key, Shard(0, 0, 0))).to_bytes()
        stub = table.protocol.get_stub(p2p_module.PeerID.from_base58(first.transport.peer))
        answer = await stub.rpc_find(dht_pb2.FindRequest(keys=[key] * 100), timeout=PATIENCE)
        assert [bool(result.value) for result in answer.results] == [True] + [False] * 99
        with pytest.raises(P2PHandlerError, match="1000 keys"):
            await stub.rpc_find(dht_pb2.FindRequest(keys=[key] * 1000), timeout=PATIENCE)
        assert await client.directory.servers(MODEL) == (info(server, 0, 8),)
        await p2p.shutdown()


@contextmanager
def silence(*nodes: Node) -> Iterator[None]:
    """The daemons of these peers do not answer, as if their network were down."""
    silenced = [
        process
        for process in daemons_of(os.getpid())
        if any(_listens_on(process, int(node.transport.addresses[0].split("/")[4])) for node in nodes)
    ]
    assert len(silenced) == len(nodes)
    for process in silenced:
        process.suspend()
        wait_until_stopped(process)
    try:
        yield
    finally:
        for process in silenced:
            process.resume()


async def test_a_client_rejoins_a_swarm_after_a_silence() -> None:
    async with swarm(SERVER, CLIENT) as (first, server, client):
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=60)
        assert await client.directory.servers(MODEL) == (info(server, 0, 8),)
        with silence(first, server):
            for _ in range(2):
                with pytest.raises(SwarmError, match="does not answer") as failure:
                    await client.directory.servers(MODEL)
                assert failure.value.hint
        assert await client.directory.servers(MODEL) == (info(server, 0, 8),)
        assert await client.directory.models() == (MODEL,)


async def test_servers_rejoin_each_other_after_a_silence() -> None:
    async with swarm(SERVER) as (one, other):
        all_peers = {one.transport.peer, other.transport.peer}
        await one.directory.announce(MODEL, info(one, 0, 4), lifetime=60)
        await other.directory.announce(MODEL, info(other, 4, 8), lifetime=60)
        with silence(one, other):
            announcing = one.directory.announce(MODEL, info(one, 0, 4), lifetime=60)
            repeating = other.directory.announce(MODEL, info(other, 4, 8), lifetime=60)
            outcomes = await asyncio.gather(announcing, repeating, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [SwarmError, SwarmError]
        await one.directory.announce(MODEL, info(one, 0, 4), lifetime=60)
        await other.directory.announce(MODEL, info(other, 4, 8), lifetime=60)
        for node in one, other:
            assert {server.peer for server in await node.directory.servers(MODEL)} == all_peers


async def test_a_peer_whose_others_have_all_left_continues_alone() -> None:
    async with swarm() as (first,):
        async with join(NetworkConfig(initial_peers=first.transport.addresses, host="127.0.0.1")) as guest:
            await guest.directory.announce(MODEL, info(guest, 0, 4), lifetime=60)
            assert await first.directory.servers(MODEL) == (info(guest, 0, 4),)
            await guest.directory.announce(MODEL, info(guest, 0, 4, ServerState.LEAVING), lifetime=60)
        await first.directory.announce(MODEL, info(first, 0, 8), lifetime=60)
        assert info(first, 0, 8) in await first.directory.servers(MODEL)


async def test_the_streams_of_one_peer_are_limited() -> None:
    async with swarm(CLIENT, CLIENT) as (server, greedy, modest):
        await server.transport.listen(echo)
        streams = [await greedy.transport.open(server.transport.peer) for _ in range(MAX_STREAMS_PER_PEER)]
        for stream in streams:
            await stream.send(b"hello")
            assert (await stream.receive())[0] == b"hello"
        surplus = await greedy.transport.open(server.transport.peer)
        told, _ = await codec.receive(surplus)
        assert isinstance(told, Failure)
        assert (told.code, told.reason) == ("busy", "this peer has 64 streams here, and 64 are allowed")
        with pytest.raises(StreamBroken):
            await surplus.receive()
        other = await modest.transport.open(server.transport.peer)
        await other.send(b"hello")
        assert (await other.receive())[0] == b"hello"


async def test_a_handler_that_raises_ends_only_its_own_stream(caplog: pytest.LogCaptureFixture) -> None:
    async with swarm(CLIENT) as (server, client):

        async def moody(stream: Stream) -> None:
            header, _ = await stream.receive()
            if header == b"fail":
                raise RuntimeError("a bug")
            await stream.send(header)

        await server.transport.listen(moody)
        failing = await client.transport.open(server.transport.peer)
        await failing.send(b"fail")
        with pytest.raises(StreamBroken):
            await failing.receive()
        assert [record.levelname for record in caplog.records if "a bug" in record.message] == ["WARNING"]
        stream = await client.transport.open(server.transport.peer)
        await stream.send(b"fine")
        assert (await stream.receive())[0] == b"fine"


async def test_a_sender_that_is_faster_than_the_receiver_waits() -> None:
    async with swarm(CLIENT) as (server, client):
        proceed = asyncio.Event()
        received: asyncio.Queue[int] = asyncio.Queue()

        async def slow(stream: Stream) -> None:
            await proceed.wait()
            while True:
                received.put_nowait(len((await stream.receive())[1]))

        await server.transport.listen(slow)
        stream = await client.transport.open(server.transport.peer)
        block = bytes(16 * 1024 * 1024)
        sending = asyncio.create_task(stream.send(b"", [block] * 8))
        done, _ = await asyncio.wait([sending], timeout=0.5)
        assert not done
        proceed.set()
        await sending
        assert await received.get() == 8 * len(block)


async def test_a_wrong_clock_is_reported_once_and_lost_peers_are_not_taken_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ahead = 0.0
    identity, daemon = Identity.temporary(), DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    async with swarm(SERVER) as (first, other):
        peers = first.transport.addresses
        directory = DhtDirectory(identity, stores_records=True, initial_peers=peers, clock=lambda: time.time() + ahead)
        transport = Libp2pTransport(identity, daemon, initial_peers=peers, attach=directory.attach)
        await transport.start()
        try:
            mine = info(Node(transport, directory), 0, 5)
            for seconds in 3600.0, 3600.0, 0.0, 0.0:  # then the clock is set right
                ahead = seconds
                await directory.announce(MODEL, mine, lifetime=60)
            await other.transport.close()
            await directory.announce(MODEL, mine, lifetime=60)
        finally:
            await transport.close()
            await directory.close()
    messages = [
        each.getMessage() for each in caplog.records if each.name == "shoal.net.libp2p.hash_table.store_failures"
    ]
    assert messages == [
        "other peers refuse this server's announcement because the clocks differ: "
        "this machine's is 3600 s ahead of theirs",
        "other peers store this server's announcement again",
    ]


@pytest.mark.parametrize(("minutes", "words"), [(5, "5 minutes ahead of"), (-5, "5 minutes behind")])
async def test_a_peer_whose_clock_is_wrong_is_told_so(minutes: float, words: str) -> None:
    said = f"this machine's clock is {words} that of 2 members"
    daemons = {True: DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",)), False: DaemonConfig()}
    async with swarm(SERVER) as (first, other):
        await first.directory.announce(MODEL, info(first, 0, 5), lifetime=60)
        await other.directory.announce(MODEL, info(other, 5, 8), lifetime=60)
        for is_server in True, False:
            identity, peers = Identity.temporary(), first.transport.addresses
            directory = DhtDirectory(
                identity,
                stores_records=is_server,
                initial_peers=peers,
                clock=lambda: time.time() + 60 * minutes,
            )
            transport = Libp2pTransport(identity, daemons[is_server], initial_peers=peers, attach=directory.attach)
            try:
                if is_server:
                    with pytest.raises(SwarmError, match=said):
                        await transport.start()
                    continue
                await transport.start()
                for read in directory.models, partial(directory.servers, MODEL):
                    with pytest.raises(SwarmError, match=said):
                        await read()
            finally:
                await transport.close()
                await directory.close()


async def test_a_peer_finds_out_whether_its_identity_is_in_use_elsewhere(tmp_path: Any) -> None:
    async with swarm(SERVER) as (first, other):
        assert await first.answers_elsewhere(first.transport.addresses)
        nowhere = f"/ip4/127.0.0.1/tcp/9/p2p/{first.transport.peer}"
        assert not await first.answers_elsewhere([nowhere])
        wrong = other.transport.addresses[0].replace(other.transport.peer, first.transport.peer)
        assert not await first.answers_elsewhere([wrong]), "another peer is there"


async def test_a_copied_identity_cannot_join(tmp_path: Any) -> None:
    original, copy = tmp_path / "identity", tmp_path / "copy"
    async with asyncio.timeout(PATIENCE), join(NetworkConfig(host="127.0.0.1", identity=original)) as node:
        copy.write_bytes(original.read_bytes())
        with pytest.raises(UserError, match="another process of this machine is the peer"):
            async with join(NetworkConfig(host="127.0.0.1", identity=copy, initial_peers=node.transport.addresses)):
                pass
