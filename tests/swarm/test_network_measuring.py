"""Servers measure their networks with each other, in virtual time over links of known speed. Some neighbors lie."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch

from shoal.net.bandwidth import TRANSFER_SECONDS, digest_of, measure_bandwidth, random_bytes
from shoal.net.memory import Frame, MemoryNetwork
from shoal.net.transport import Node, Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ServerInfo, ServerState
from shoal.policy.network.network_speed import BUFFER_BYTES, COPIES_SENT, FIRST_WAIT, REFRESH_SECONDS
from shoal.policy.network.transfer_budget import ALL_BYTES, MIN_CHARGE, PEER_BYTES, WINDOW_SECONDS
from shoal.protocol import (
    MAX_TRANSFER_BYTES,
    REQUEST_KINDS,
    TRANSFER_KINDS,
    AnyMessage,
    Close,
    Failure,
    Filler,
    Ping,
    Pong,
    Transfer,
)
from shoal.server.measuring.metering import Meter, metered
from shoal.server.measuring.network_monitor import RETRY_SECONDS, NetworkMonitor, in_order
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.streams import Handler
from shoal.spans import Span

from . import virtual_time

T = TypeVar("T")

MIB = 1 << 20
TOKEN_BYTES = 4096


def server(peer: str, *, zone: str = "", addresses: tuple[str, ...] = ()) -> ServerInfo:
    return ServerInfo(
        peer, Span(0, 4), ServerState.ONLINE, "f", 1.0, 1.0, 1, "float32", "none", "1", addresses=addresses, zone=zone
    )


class Neighborhood:
    """Peers on links of known speed. Each answers as a server does, unless it is given something else to do."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()

    async def add(
        self,
        name: str,
        *,
        up: float | None = None,
        down: float | None = None,
        answer: Callable[[Stream], Awaitable[None]] | None = None,
    ) -> Node:
        node = self.network.node(name)
        self.network.limit(name, up=up, down=down)
        await node.transport.listen(answer or real_handler(node))
        return node


def real_handler(node: Node) -> Handler:
    """What a server does with streams, without anything to compute with."""
    engine = SimpleNamespace(
        num_passes=0,
        queue_length=0,
        cache_tokens_left=0,
        passes=SimpleNamespace(release=lambda peer: None),
        validator=SimpleNamespace(check_declared=lambda message: None),
    )
    return Handler(cast(Any, engine), PushService(node.transport), idle_seconds=60.0)


def run(scene: Callable[[Neighborhood], Coroutine[Any, Any, T]]) -> T:
    """What a scene returns, in virtual time."""

    async def play() -> T:
        neighborhood = Neighborhood()
        try:
            return await scene(neighborhood)
        finally:
            await neighborhood.network.close()

    return virtual_time.run(play())


@pytest.mark.parametrize("trip", [0.0, 0.05])
@pytest.mark.parametrize(("up", "down"), [(0.5, 8.0), (12.0, 2.0), (0.2, 0.2), (100.0, 100.0)])
def test_a_server_finds_out_how_fast_its_link_is_in_both_directions(up: float, down: float, trip: float) -> None:
    async def scene(world: Neighborhood) -> tuple[float | None, float | None]:
        me = await world.add("me", up=up * MIB, down=down * MIB)
        await world.add("neighbor")
        world.network.delay(trip)
        return await measure_bandwidth(me.transport, "neighbor")

    found = run(scene)
    assert found == (pytest.approx(up * MIB, rel=0.1), pytest.approx(down * MIB, rel=0.1))


def test_a_slow_link_costs_few_bytes() -> None:
    async def scene(world: Neighborhood) -> tuple[int, float]:
        me = await world.add("me", up=0.2 * MIB, down=0.2 * MIB)
        await world.add("neighbor")
        num_bytes = 0

        def count(frame: Frame) -> Frame:
            nonlocal num_bytes
            num_bytes += len(frame.payload)
            return frame

        world.network.on_frame = count
        await measure_bandwidth(me.transport, "neighbor")
        return num_bytes, asyncio.get_running_loop().time()

    num_bytes, seconds = run(scene)
    assert num_bytes == 2 * (256 << 10)
    assert seconds < 4.0


def test_a_peer_that_is_gone_or_silent_helps_nothing_and_does_not_stop_anything() -> None:
    async def silent(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def scene(world: Neighborhood) -> list[tuple[float | None, float | None]]:
        me = await world.add("me")
        await world.add("silent", answer=silent)
        return [await measure_bandwidth(me.transport, peer) for peer in ("gone", "silent")]

    assert run(scene) == [(None, None)] * 2


def monitor_of(
    node: Node, meter: Meter, *partners: ServerInfo, on_change: Callable[[], None] = lambda: None
) -> NetworkMonitor:
    return NetworkMonitor(
        node.transport, meter, token_bytes=TOKEN_BYTES, partners=lambda: partners, on_change=on_change
    )


def test_the_fastest_of_three_neighbors_tells_most_and_a_fourth_is_not_asked() -> None:
    async def scene(world: Neighborhood) -> tuple[float | None, list[float | None], set[str]]:
        meter = Meter()
        me = metered(await world.add("me", up=4 * MIB, down=40 * MIB), meter)
        asked: set[str] = set()
        for name, rate in ("slow", 0.3), ("quick", 100.0), ("middling", 2.0), ("fourth", 200.0):
            node = await world.add(name, up=rate * MIB, down=rate * MIB)
            handler = real_handler(node)

            async def note(stream: Stream, name: str = name, handler: Handler = handler) -> None:
                asked.add(name)
                await handler(stream)

            await node.transport.listen(note)
        seen: list[float | None] = []
        monitor = monitor_of(
            me,
            meter,
            *map(server, ("slow", "quick", "middling", "fourth")),
            on_change=lambda: seen.append(monitor.speed),
        )
        seen.append(monitor.speed)
        async with monitor.measuring():
            await asyncio.sleep(60)
            return monitor.speed, seen, asked

    speed, seen, asked = run(scene)
    assert speed == pytest.approx(4 * MIB / COPIES_SENT / TOKEN_BYTES, rel=0.1)
    assert seen == [None, speed]
    assert asked == {"slow", "quick", "middling"}


def test_a_server_without_neighbors_waits_for_the_first() -> None:
    async def scene(world: Neighborhood) -> list[float | None]:
        meter = Meter()
        me = metered(await world.add("me"), meter)
        partners: list[ServerInfo] = []
        monitor = NetworkMonitor(me.transport, meter, token_bytes=TOKEN_BYTES, partners=lambda: partners)
        async with monitor.measuring():
            await asyncio.sleep(100)
            before = monitor.speed
            await world.add("neighbor", up=MIB, down=MIB)
            partners.append(server("neighbor"))
            await asyncio.sleep(RETRY_SECONDS + 10)
            return [before, monitor.speed]

    assert run(scene) == [None, pytest.approx(MIB / COPIES_SENT / TOKEN_BYTES, rel=0.1)]


def test_neighbors_in_other_zones_are_asked_first_and_relayed_ones_last() -> None:
    relayed = server("relayed", zone="b", addresses=("/ip4/1.2.3.4/tcp/1/p2p/x/p2p-circuit/p2p/y",))
    near, far, unknown = server("near", zone="a"), server("far", zone="b"), server("unknown")
    assert in_order([near, relayed, far, unknown], zone="a") == [far, unknown, relayed, near]
    assert in_order([near, far], zone="") == [near, far]


# What sessions show.


async def send_bulk(stream: Stream) -> None:
    """A replay: frames of 2 MiB, one after another."""
    for _ in range(3 * BUFFER_BYTES // (2 * MIB)):
        await stream.send(b"{}", [bytes(2 * MIB)])


async def swallow(stream: Stream) -> None:
    while True:
        await stream.receive()


def test_a_network_that_became_slower_is_measured_again_when_sessions_have_shown_it() -> None:
    async def scene(world: Neighborhood) -> tuple[list[float | None], list[float]]:
        meter, clock = Meter(), asyncio.get_running_loop().time
        me = metered(await world.add("me", up=16 * MIB, down=16 * MIB), meter)
        await world.add("neighbor")
        await world.add("client", answer=swallow)
        changes: list[float] = []
        monitor = monitor_of(me, meter, server("neighbor"), on_change=lambda: changes.append(clock()))
        async with monitor.measuring():
            await asyncio.sleep(2 * FIRST_WAIT)
            speeds = [monitor.speed]
            world.network.limit("me", up=2 * MIB, down=16 * MIB)
            stream = await me.transport.open("client")
            for _ in range(3):
                await send_bulk(stream)
                await asyncio.sleep(1)
            await asyncio.sleep(60)
            speeds.append(monitor.speed)
            await stream.close()
        return speeds, changes

    speeds, changes = run(scene)
    assert speeds == [pytest.approx(rate * MIB / COPIES_SENT / TOKEN_BYTES, rel=0.1) for rate in (16, 2)]
    assert len(changes) == 2
    assert changes[1] < REFRESH_SECONDS / 10


def test_a_slow_client_alone_changes_nothing() -> None:
    async def scene(world: Neighborhood) -> list[float | None]:
        meter = Meter()
        me = metered(await world.add("me", up=16 * MIB, down=16 * MIB), meter)
        await world.add("neighbor")
        await world.add("client", down=MIB, answer=swallow)
        monitor = monitor_of(me, meter, server("neighbor"))
        async with monitor.measuring():
            await asyncio.sleep(2 * FIRST_WAIT)
            before = monitor.speed
            stream = await me.transport.open("client")
            for _ in range(4):
                await send_bulk(stream)
            await asyncio.sleep(60)
            await stream.close()
            return [before, monitor.speed]

    before, after = run(scene)
    assert after == pytest.approx(before, rel=0.05)


def test_what_comes_faster_than_was_measured_counts_at_once() -> None:
    async def scene(world: Neighborhood) -> list[float | None]:
        meter = Meter()
        me = metered(await world.add("me", up=100 * MIB, down=64 * MIB, answer=None), meter)
        await me.transport.listen(swallow)
        await world.add("neighbor", up=MIB)
        client = await world.add("client")
        monitor = monitor_of(me, meter, server("neighbor"))
        async with monitor.measuring():
            await asyncio.sleep(2 * FIRST_WAIT)
            speeds = [monitor.speed]
            stream = await client.transport.open("me")
            await send_bulk(stream)
            await asyncio.sleep(0.01)
            speeds.append(monitor.speed)
            await stream.close()
            return speeds

    before, after = run(scene)
    assert before == pytest.approx(MIB / TOKEN_BYTES, rel=0.1)
    # What the buffers may hold is no proof.
    assert after is not None
    assert before is not None
    assert 8 * before < after <= 64 * MIB / TOKEN_BYTES


def test_the_network_is_measured_when_no_session_uses_it() -> None:
    async def scene(world: Neighborhood) -> tuple[float | None, float | None]:
        meter = Meter()
        me = metered(await world.add("me", up=MIB, down=MIB), meter)
        await world.add("neighbor")
        await world.add("client", answer=swallow)
        stream = await me.transport.open("client")
        sending = asyncio.create_task(stream.send(b"{}", [bytes(10 * MIB)]))
        await asyncio.sleep(0.1)
        monitor = monitor_of(me, meter, server("neighbor"))
        async with monitor.measuring():
            await asyncio.sleep(9)
            during = monitor.speed
            await asyncio.sleep(20)
            after = monitor.speed
        await sending
        await stream.close()
        return during, after

    during, after = run(scene)
    assert during is None
    assert after == pytest.approx(MIB / COPIES_SENT / TOKEN_BYTES, rel=0.1)


# Peers that mean harm.


async def ask(node: Node, *requests: tuple[AnyMessage, torch.Tensor | None], peer: str = "victim") -> list[AnyMessage]:
    """Send messages on one stream, each when the one before was answered. Returns the answers."""
    stream = await node.transport.open(peer)
    answers: list[AnyMessage] = []
    try:
        for message, filler in requests:
            await codec.send(stream, message, {} if filler is None else {"filler": filler})
            answer, _ = await codec.receive(stream)
            answers.append(answer)
    except StreamBroken:
        pass
    finally:
        await stream.close()
    return answers


class Counted:
    """The bytes of fillers that the victim sent, and that it received."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.sent = self.received = 0
        network.on_frame = self._count

    def _count(self, frame: Frame) -> Frame:
        if frame.sender == "victim":
            self.sent += len(frame.payload)
        else:
            self.received += len(frame.payload)
        return frame


def test_a_peer_that_asks_for_endless_transfers_gets_its_budget_and_no_more() -> None:
    async def scene(world: Neighborhood) -> tuple[Counted, AnyMessage]:
        await world.add("victim")
        mallory = world.network.node("mallory")
        counted = Counted(world.network)
        for _ in range(100):
            *_, last = await ask(mallory, *[(Transfer(wants=MAX_TRANSFER_BYTES), None)] * 3)
        return counted, last

    counted, last = run(scene)
    assert counted.sent == PEER_BYTES
    assert isinstance(last, Failure)
    assert last.code == "busy"
    assert last.retry_after == WINDOW_SECONDS


def test_a_peer_that_sends_without_end_is_heard_for_its_budget_and_no_more() -> None:
    async def scene(world: Neighborhood) -> tuple[Counted, list[str]]:
        await world.add("victim")
        mallory = world.network.node("mallory")
        filler = random_bytes(MAX_TRANSFER_BYTES)
        counted, kinds = Counted(world.network), []
        for _ in range(100):
            asks = Transfer(sends=MAX_TRANSFER_BYTES)
            answers = await ask(mallory, (asks, None), (Filler(), filler))
            kinds += [
                answer.kind
                for answer in answers
                if isinstance(answer, Failure | Filler) and (isinstance(answer, Failure) or answer.digest)
            ]
        return counted, kinds

    counted, kinds = run(scene)
    assert kinds.count("filler") == PEER_BYTES // MAX_TRANSFER_BYTES
    assert counted.received == PEER_BYTES
    assert kinds.count("failure") == 100 - PEER_BYTES // MAX_TRANSFER_BYTES


def test_many_peers_together_get_a_budget_too_and_it_grows_again_with_time() -> None:
    async def scene(world: Neighborhood) -> list[int]:
        await world.add("victim")
        counted = Counted(world.network)
        sums = []
        for _ in range(2):
            for index in range(30):
                name = f"mallory {index}"
                world.network.kill(name)
                await ask(world.network.node(name), *[(Transfer(wants=MAX_TRANSFER_BYTES), None)] * 4)
            sums.append(counted.sent)
            await asyncio.sleep(WINDOW_SECONDS)
        return sums

    assert run(scene) == [ALL_BYTES, 2 * ALL_BYTES]


@pytest.mark.parametrize(
    "frames",
    [
        [(Filler(), MIN_CHARGE)],
        [(Transfer(sends=MIN_CHARGE), 0), (Filler(), 2 * MIN_CHARGE)],
        [(Transfer(sends=MIN_CHARGE), 0), (Filler(), 16)],
        [(Transfer(sends=MIN_CHARGE), 0), (Filler(), 0)],
        [(Transfer(sends=MIN_CHARGE), 0), (Ping(), 0)],
        [(Transfer(sends=MIN_CHARGE), 0), (Failure(code="busy", reason="no"), 0)],
    ],
)
def test_bytes_that_were_not_agreed_on_are_refused(frames: list[tuple[AnyMessage, int]]) -> None:
    async def scene(world: Neighborhood) -> list[AnyMessage]:
        await world.add("victim")
        mallory = world.network.node("mallory")
        return await ask(mallory, *[(message, random_bytes(size) if size else None) for message, size in frames])

    last = run(scene)[-1]
    assert isinstance(last, Failure)
    assert last.code == "rejected"


def test_a_peer_that_never_sends_what_it_announced_keeps_no_other_from_measuring() -> None:
    async def scene(world: Neighborhood) -> tuple[tuple[float | None, float | None], AnyMessage]:
        await world.add("victim", up=MIB, down=MIB)
        mallory, me = world.network.node("mallory"), await world.add("me")
        stream = await mallory.transport.open("victim")
        await codec.send(stream, Transfer(sends=MIN_CHARGE))
        await codec.receive(stream)
        (second,) = await ask(mallory, (Transfer(wants=16), None))
        found = await measure_bandwidth(me.transport, "victim")
        await asyncio.sleep(TRANSFER_SECONDS)
        with pytest.raises(StreamBroken):
            await codec.receive(stream)
        return found, second

    found, second = run(scene)
    assert found == (pytest.approx(MIB, rel=0.1), pytest.approx(MIB, rel=0.1))
    assert isinstance(second, Failure), "one transfer at a time"


Answer = Callable[[Stream, Transfer], Awaitable[None]]


def answering(answer: Answer) -> Callable[[Stream], Awaitable[None]]:
    """A neighbor that answers pings as it should, and transfers as it likes."""

    async def handle(stream: Stream) -> None:
        while True:
            message, _ = await codec.receive(stream, REQUEST_KINDS)
            if isinstance(message, Ping):
                await codec.send(stream, Pong())
            elif isinstance(message, Transfer):
                await answer(stream, message)
            elif isinstance(message, Close):
                return

    return handle


async def says_at_once_that_it_has_everything(stream: Stream, request: Transfer) -> None:
    await codec.send(stream, Filler())
    if request.sends:
        await codec.send(stream, Filler(digest="0" * 32))
        await codec.receive(stream, TRANSFER_KINDS)


async def sends_more_than_was_asked_for(stream: Stream, request: Transfer) -> None:
    await codec.send(stream, Filler(), {"filler": random_bytes(MAX_TRANSFER_BYTES)})


async def promises_and_does_nothing(stream: Stream, request: Transfer) -> None:
    if request.sends:
        await codec.send(stream, Filler())
    await asyncio.Event().wait()


async def answers_with_the_digest_of_something_else(stream: Stream, request: Transfer) -> None:
    await codec.send(stream, Filler())
    if request.sends:
        _, tensors = await codec.receive(stream, TRANSFER_KINDS)
        await codec.send(stream, Filler(digest=digest_of(tensors["filler"][1:])))


@pytest.mark.parametrize(
    "answer",
    [
        says_at_once_that_it_has_everything,
        sends_more_than_was_asked_for,
        promises_and_does_nothing,
        answers_with_the_digest_of_something_else,
    ],
)
def test_a_neighbor_that_lies_makes_no_network_look_fast_and_none_wait(answer: Answer) -> None:
    async def scene(world: Neighborhood) -> tuple[tuple[float | None, float | None], float]:
        me = await world.add("me", up=MIB, down=MIB)
        await world.add("liar", answer=answering(answer))
        found = await measure_bandwidth(me.transport, "liar")
        return found, asyncio.get_running_loop().time()

    found, seconds = run(scene)
    assert found == (None, None)
    assert seconds < 3 * TRANSFER_SECONDS
