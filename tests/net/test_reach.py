"""Peers that ask others to dial them back, and keep places at relays where these cannot: on the real network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import psutil
import pytest

from shoal.net import NetworkConfig, join
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon, DaemonConfig
from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.libp2p.reach import reach_keeper, relay_daemon, relay_places
from shoal.net.libp2p.reach.examiner import examined_by
from shoal.net.libp2p.reach.prober import Prober
from shoal.net.libp2p.reach.reservations import NotReserved, reserve
from shoal.net.libp2p.strangers import stranger
from shoal.net.transport import Node, Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ModelInfo
from shoal.policy.network.reachability import MIN_RELAYED_BYTES, PEER_REQUESTS, Reachability
from shoal.protocol import REACH_PROTOCOL, REPLY_KINDS, DialBack, DialedBack, Failure, Ping, Pong

from .. import server_infos

pytestmark = pytest.mark.anyio

MODEL = ModelInfo(key="m" * 32, name="org/tiny", family="llama", num_blocks=8)

NOWHERE = "/ip4/127.0.0.1/tcp/1"
"""An address that this machine does not answer at."""


@asynccontextmanager
async def peers(*configs: dict[str, Any]) -> AsyncIterator[list[Node]]:
    """Peers on loopback. All but the first join by the first."""
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for config in configs:
            initial = nodes[0].transport.addresses[:1] if nodes else ()
            nodes.append(await stack.enter_async_context(join(NetworkConfig(initial, host="127.0.0.1", **config))))
        yield nodes


async def answer_pings(stream: Stream) -> None:
    while True:
        await codec.receive(stream)
        await codec.send(stream, Pong())


async def test_the_first_peer_of_a_swarm_does_not_know_whether_others_reach_it():
    async with peers({}) as (node,):
        assert node.transport.reach.kind is Reachability.UNKNOWN


async def test_a_peer_that_joins_is_dialled_back_from_a_port_of_which_it_knows_nothing():
    async with peers({}, {}) as (first, second):
        reach = second.transport.reach
        assert reach.kind is Reachability.DIRECT
        (report,) = reach.reports
        assert report.examiner == first.transport.peer
        assert report.reached == second.transport.addresses
        assert not report.is_outside
        assert report.seen_at is not None
        assert report.seen_at.startswith("/ip4/127.0.0.1/")
        assert abs(report.clock_ahead) < 1


async def test_what_cannot_be_dialled_and_has_no_relay_is_unreachable():
    async with peers({}, {"announce": (NOWHERE,)}) as (_, second):
        assert second.transport.reach.kind is Reachability.UNREACHABLE
        assert second.transport.addresses == (f"{NOWHERE}/p2p/{second.transport.peer}",)


async def test_what_cannot_be_dialled_takes_a_place_at_a_peer_that_relays_and_is_reached_there():
    async with peers({"serve_relay": True}, {"announce": (NOWHERE,)}, {}) as (first, second, third):
        reach = second.transport.reach
        assert reach.kind is Reachability.RELAYED
        expected = f"{first.transport.addresses[0]}/p2p-circuit/p2p/{second.transport.peer}"
        assert reach.relayed == (expected,)
        assert second.transport.addresses[0] == expected
        await second.transport.listen(answer_pings)
        stream = await third.transport.open(second.transport.peer, second.transport.addresses)
        await codec.send(stream, Ping())
        answer, _ = await codec.receive(stream, REPLY_KINDS)
        assert isinstance(answer, Pong)
        await stream.close()


async def test_the_record_of_a_peer_behind_a_relay_is_stored_by_others_as_its_own():
    async with peers({"serve_relay": True}, {"announce": (NOWHERE,)}, {}) as (first, second, third):
        mine = server_infos.info(second.transport.peer, addresses=second.transport.addresses)
        await second.directory.announce(MODEL, mine, lifetime=60)
        for reader in first, third:
            assert await reader.directory.servers(MODEL) == (mine,)


async def test_relays_that_are_named_are_used_without_asking_anyone():
    async with peers({"serve_relay": True}, {}) as (relay, member):
        known = member.transport.addresses[:1]
        config = NetworkConfig(known, host="127.0.0.1", relays=relay.transport.addresses[:1])
        async with join(config) as node:
            assert node.transport.reach.kind is Reachability.RELAYED
            assert node.transport.reach.reports == ()


async def test_a_relay_that_was_restarted_is_used_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reach_keeper, "RENEW_SECONDS", 0.05)  # it would take a minute
    identity = Identity.temporary()
    config = DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",), serve_relay=True)
    relay = await relay_daemon.start_daemon(identity, config)
    try:
        (address,) = await relay.addresses()
        named = f"{address}/p2p/{identity.peer}"
        async with join(NetworkConfig((), host="127.0.0.1", relays=(named,))) as node:
            reached = node.transport.reach
            while not reached.relayed:  # a relay that has just been started may not relay yet
                reached = await node.transport.reach_other_than(reached)
            await relay.stop()
            lost = await node.transport.reach_other_than(reached)
            assert lost.kind is Reachability.UNREACHABLE
            relay = await relay_daemon.start_daemon(identity, DaemonConfig(listen=(address,), serve_relay=True))
            again = await node.transport.reach_other_than(lost)
            assert again.relayed == reached.relayed
            (trial,) = await node.try_relays()
            assert (trial.relay, trial.why) == (named, "")
    finally:
        await relay.stop()


async def test_places_are_taken_again_after_the_own_daemon_has_died():
    async with peers({"serve_relay": True}, {"announce": (NOWHERE,)}, {}) as (first, second, third):
        reached = second.transport.reach
        assert reached.relayed
        dead = daemon_of(second)
        (program,) = psutil.Process(dead.process.pid).children()
        program.kill()
        await dead.closed.wait()
        await second.transport.listen(answer_pings)
        while True:  # until the new daemon has its place
            with contextlib.suppress(StreamBroken):
                stream = await third.transport.open(second.transport.peer, reached.relayed)
                break
        await codec.send(stream, Ping())
        assert isinstance((await codec.receive(stream, REPLY_KINDS))[0], Pong)
        await stream.close()
        assert daemon_of(second) is not dead
        assert second.transport.reach.relayed == reached.relayed
        assert first.transport.reach.kind is Reachability.UNKNOWN


async def test_one_missed_renewal_costs_no_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reach_keeper, "RENEW_SECONDS", 0.01)  # it would take a minute
    misses, has_missed = 0, asyncio.Event()
    real = relay_places.reserve

    async def reserve_sometimes(daemon: Daemon, relay: str, addresses: Sequence[str]) -> int | None:
        nonlocal misses
        if misses < relay_places.MISSES - 1:
            misses += 1
            raise NotReserved("it does not answer")
        has_missed.set()
        return await real(daemon, relay, addresses)

    async with peers({"serve_relay": True}, {"announce": (NOWHERE,)}) as (_, second):
        reached = second.transport.reach
        monkeypatch.setattr(relay_places, "reserve", reserve_sometimes)
        await has_missed.wait()
        assert misses == relay_places.MISSES - 1
        assert second.transport.reach.relayed == reached.relayed


async def test_a_defect_in_an_examination_does_not_repeat_at_once():
    calls = 0

    def known() -> dict[str, tuple[str, ...]]:
        nonlocal calls
        calls += 1
        raise RuntimeError("a defect")

    keeper = reach_keeper.ReachKeeper("own", known=known, own=lambda: ())
    keeper.attach(cast("Daemon", object()))
    await keeper.start(seconds=5)
    for _ in range(100):
        await asyncio.sleep(0)
    await keeper.close()
    assert calls == 1


def at(address: str) -> tuple[str, tuple[str, ...]]:
    """The peer at an address, and the address, as `reserve` takes them."""
    return address.rpartition("/")[2], (address,)


@asynccontextmanager
async def daemon(**config: Any) -> AsyncIterator[tuple[Daemon, str, str]]:
    """A daemon on loopback, its peer id, and its address."""
    identity = Identity.temporary()
    started = await relay_daemon.start_daemon(identity, DaemonConfig(listen=("/ip4/127.0.0.1/tcp/0",), **config))
    try:
        (address,) = await started.addresses()
        yield started, identity.peer, f"{address}/p2p/{identity.peer}"
    finally:
        await started.stop()


async def test_a_relay_says_how_much_it_carries_and_libp2ps_own_carries_too_little():
    async with daemon() as (own, _, _):
        async with daemon(serve_relay=True) as (_, _, generous):
            found = await reserve(own, *at(generous))
            assert found is None or found >= MIN_RELAYED_BYTES
        async with daemon() as (_, _, stingy):
            found = await reserve(own, *at(stingy))
            assert found is not None
            assert found < MIN_RELAYED_BYTES
        async with (
            peers({}) as (first,),
            join(NetworkConfig(first.transport.addresses[:1], host="127.0.0.1", relays=(stingy,))) as node,
        ):
            assert node.transport.reach.kind is Reachability.UNREACHABLE


@pytest.mark.parametrize(("small", "starts"), [(0, 1), (2, 3), (99, relay_daemon.MAX_STARTS)])
async def test_a_relay_that_carries_too_little_is_started_again(
    small: int, starts: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked: list[str] = []
    processes: set[int] = set()

    async def reserve_small(_: Daemon, relay: str, addresses: Sequence[str]) -> int:
        asked.append(relay)
        return MIN_RELAYED_BYTES - 1 if len(asked) <= small else MIN_RELAYED_BYTES

    real = Daemon.start

    async def start(identity: Identity, config: DaemonConfig) -> Daemon:
        started = await real(identity, config)
        if config.serve_relay:
            processes.add(started.process.pid)
        return started

    monkeypatch.setattr(relay_daemon, "reserve", reserve_small)
    monkeypatch.setattr(Daemon, "start", start)
    async with daemon(serve_relay=True) as (last, peer, _):
        assert asked == [peer] * starts
        assert len(processes) == starts
        assert last.process.pid in processes
        assert not last.closed.is_set()
    assert ("relays too little" in caplog.text) == (starts == relay_daemon.MAX_STARTS)


async def test_a_relay_that_is_gone_gives_no_place():
    async with daemon() as (own, _, _):
        async with daemon(serve_relay=True) as (_, _, address):
            pass
        with pytest.raises(NotReserved, match="cannot be reached"):
            await reserve(own, *at(address))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"\xff\xff\xff\xff\x7f", "makes no sense"),  # a length without end
        (b"\x90\x7f" + bytes(20), "makes no sense"),  # longer than any answer
        (b"\x04\xff\xff\xff\xff", "makes no sense"),
        (b"\x05\x08\x02\x28\xc9\x01", "no place left"),
        (b"\x04\x08\x02\x28\x64"[:4], "cannot be reached"),  # it ends in the middle
        (b"\x02\x08\x02", "it refuses"),
    ],
)
async def test_answers_of_relays_are_read_with_care(answer: bytes, why: str):
    async with daemon() as (own, _, _), daemon() as (liar, _, address):
        writers: list[asyncio.StreamWriter] = []
        is_cut_off = why == "cannot be reached"

        def lie(peer: str, where: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answer)
            writers.append(writer)
            if is_cut_off:
                writer.close()

        await liar.handle("/libp2p/circuit/relay/0.2.0/hop", lie)
        with pytest.raises(NotReserved, match=why):
            await reserve(own, *at(address))
        for writer in writers:
            writer.close()
        assert writers


async def test_a_peer_dials_only_the_addresses_of_the_peer_that_asks():
    async with peers({}, {}) as (first, second), stranger() as asker:
        await asker.connect(first.transport.peer, first.transport.addresses)
        for address in (second.transport.addresses[0], f"{NOWHERE}", f"{first.transport.addresses[0]}/p2p-circuit"):
            _, reader, writer = await asker.open(first.transport.peer, REACH_PROTOCOL)
            stream = Libp2pStream(first.transport.peer, reader, writer)
            await codec.send(stream, DialBack(addresses=(address,)))
            answer, _ = await codec.receive(stream)
            assert isinstance(answer, Failure)
            assert answer.code == "rejected"
            await stream.close()


async def test_a_peer_that_asks_too_often_is_told_to_come_back():
    async with peers({}, {}) as (first, second):
        answers = []
        for _ in range(PEER_REQUESTS):
            async with asyncio.timeout(20):
                stream = await open_reach(second, first)
                await codec.send(stream, DialBack(addresses=second.transport.addresses[:1]))
                answers.append((await codec.receive(stream))[0])
                await stream.close()
        assert [type(answer) for answer in answers] == [DialedBack] * (PEER_REQUESTS - 1) + [Failure]


def daemon_of(node: Node) -> Any:
    """A node's own daemon. Its users see streams and what becomes of them, and never which process carries them."""
    transport: Any = node.transport
    return transport._daemon


async def open_reach(node: Node, other: Node) -> Libp2pStream:
    """A stream of `REACH_PROTOCOL` from one peer to another."""
    _, reader, writer = await daemon_of(node).open(other.transport.peer, REACH_PROTOCOL)
    return Libp2pStream(other.transport.peer, reader, writer)


async def test_a_peer_that_does_not_examine_is_no_opinion():
    async with daemon() as (own, _, address), daemon() as (_, other, elsewhere):
        await own.connect(other, (elsewhere,))
        assert await examined_by(other, own, (address,)) is None


async def test_the_prober_tells_a_peer_from_another_one_at_its_address():
    prober = Prober()
    try:
        async with daemon() as (_, one, where), daemon() as (_, other, _):
            assert await prober.reached(one, (where, f"{NOWHERE}/p2p/{one}")) == [True, False]
            assert await prober.reached(other, (where.replace(one, other),)) == [False]
        assert await prober.reached(one, (where,)) == [False]
    finally:
        await prober.close()
