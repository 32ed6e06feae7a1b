"""The network in memory, on which other tests rely, keeps its promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from shoal.net.memory import QUEUE_FRAMES, Frame, MemoryNetwork
from shoal.net.transport import Stream, StreamBroken
from shoal.peers import ModelInfo, ServerState
from shoal.protocol import MAX_HEADER_BYTES, ProtocolViolation

from ..server_infos import info

pytestmark = pytest.mark.anyio

MODEL = ModelInfo(key="m" * 16, name="tiny", family="llama", num_blocks=8)


async def echo(stream: Stream) -> None:
    while True:
        header, payload = await stream.receive()
        await stream.send(header, [payload])


class Clock:
    """The loop's own time, which a test can advance."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._real = loop.time
        self._ahead = 0.0
        loop.time = self.now  # type: ignore[method-assign]

    def now(self) -> float:
        return self._real() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds

    def stop(self) -> None:
        asyncio.get_running_loop().time = self._real  # type: ignore[method-assign]


@pytest.fixture
async def clock() -> AsyncIterator[Clock]:
    clock = Clock()
    yield clock
    clock.stop()


async def settle() -> None:
    """Run all tasks that are ready, and those that they make ready."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


async def connected(network: MemoryNetwork) -> Stream:
    client, server = network.node("client"), network.node("server")
    await server.transport.listen(echo)
    return await client.transport.open("server")


async def test_a_frame_comes_back_as_it_was_sent(network: MemoryNetwork) -> None:
    stream = await connected(network)
    await stream.send(b"header", [b"pay", memoryview(b"load")])
    assert await stream.receive() == (b"header", bytearray(b"payload"))


async def test_a_peer_that_is_unknown_or_does_not_listen_cannot_be_reached(network: MemoryNetwork) -> None:
    client = network.node("client").transport
    network.node("deaf")
    for peer in "unknown", "deaf":
        with pytest.raises(StreamBroken):
            await client.open(peer)


async def test_killing_a_peer_breaks_its_streams_at_once_and_for_good(network: MemoryNetwork) -> None:
    stream = await connected(network)
    waiting = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    network.kill("server")
    with pytest.raises(StreamBroken):
        await waiting
    with pytest.raises(StreamBroken):
        await stream.send(b"more")
    network.heal()
    with pytest.raises(StreamBroken):
        await network.node("other").transport.open("server")


async def test_a_killed_peer_can_be_started_again(network: MemoryNetwork) -> None:
    await connected(network)
    network.kill("server")
    again = network.node("server")
    await again.transport.listen(echo)
    stream = await network.node("other").transport.open("server")
    await stream.send(b"hello")
    assert await stream.receive() == (b"hello", bytearray())


async def test_a_hung_peer_accepts_frames_and_answers_when_it_is_healed(network: MemoryNetwork) -> None:
    stream = await connected(network)
    network.hang("server")
    await stream.send(b"anyone?")
    answer = asyncio.create_task(stream.receive())
    await settle()
    assert not answer.done()
    network.heal("server")
    assert await answer == (b"anyone?", bytearray())


async def test_a_cut_link_refuses_new_streams_until_it_is_healed(network: MemoryNetwork) -> None:
    stream = await connected(network)
    client = network.node("second").transport
    network.cut("client", "server")
    with pytest.raises(StreamBroken):
        await stream.receive()
    await (await client.open("server")).send(b"other links still work")
    network.cut("second", "server")
    with pytest.raises(StreamBroken):
        await client.open("server")
    network.heal("second", "server")
    await client.open("server")


async def answers_of(stream: Stream) -> asyncio.Task[tuple[bytes, bytearray]]:
    """Send one more frame, and receive its answer in a task."""
    await stream.send(b"anyone?")
    answer = asyncio.create_task(stream.receive())
    await settle()
    return answer


async def test_a_black_hole_between_two_peers_does_not_affect_others(network: MemoryNetwork) -> None:
    stream = await connected(network)
    other = await network.node("other").transport.open("server")
    network.hang("server", "client")
    answer = await answers_of(stream)
    assert not answer.done()
    assert (await answers_of(other)).done()
    network.heal("client")
    assert (await answer)[0] == b"anyone?"


@pytest.mark.parametrize(("sender", "arrived"), [("server", [b"anyone?"]), ("client", [])])
async def test_one_direction_of_a_link_may_be_muted(network: MemoryNetwork, sender: str, arrived: list[bytes]) -> None:
    client, server = network.node("client"), network.node("server")
    received: list[bytes] = []

    async def listen(stream: Stream) -> None:
        header, _ = await stream.receive()
        received.append(header)
        await stream.send(header)

    await server.transport.listen(listen)
    stream = await client.transport.open("server")
    network.mute(sender)
    answer = await answers_of(stream)
    assert received == arrived
    assert not answer.done()
    network.heal()
    assert (await answer)[0] == b"anyone?"


async def test_a_peer_that_is_cut_off_from_all_is_alive_when_it_is_healed(network: MemoryNetwork) -> None:
    stream = await connected(network)
    other = network.node("other").transport
    network.cut("server")
    with pytest.raises(StreamBroken):
        await stream.receive()
    with pytest.raises(StreamBroken):
        await other.open("server")
    network.heal("server")
    assert (await answers_of(await other.open("server"))).done()


async def test_streams_that_break_can_be_opened_again(network: MemoryNetwork) -> None:
    stream = await connected(network)
    network.disconnect("server")
    with pytest.raises(StreamBroken):
        await stream.receive()
    assert (await answers_of(await network.node("other").transport.open("server"))).done()


async def test_the_link_between_two_peers_may_be_slow(network: MemoryNetwork, clock: Clock) -> None:
    stream = await connected(network)
    other = await network.node("other").transport.open("server")
    network.delay(1800, "server", "client")
    assert (await answers_of(other)).done()
    answer = await answers_of(stream)
    clock.advance(1801)
    await settle()
    assert not answer.done()
    clock.advance(1801)
    assert (await answer)[0] == b"anyone?"


async def test_the_remains_of_a_killed_peer_do_not_affect_its_successor(network: MemoryNetwork) -> None:
    before = network.node("server")
    network.kill("server")
    after = network.node("server")
    await after.transport.listen(echo)
    await after.directory.announce(MODEL, info("server"), lifetime=60)
    await before.directory.announce(MODEL, info("server", state=ServerState.LEAVING), lifetime=60)
    await before.transport.close()
    assert await after.directory.servers(MODEL) == (info("server"),)
    assert (await answers_of(await network.node("client").transport.open("server"))).done()


async def test_drop_after_ends_the_stream_behind_that_frame(network: MemoryNetwork) -> None:
    stream = await connected(network)
    network.drop_after("server", 2)
    for number in b"1", b"2":
        await stream.send(number)
        assert (await stream.receive())[0] == number
    with pytest.raises(StreamBroken):
        await stream.receive()


async def test_a_hook_alters_and_loses_frames(network: MemoryNetwork) -> None:
    stream = await connected(network)
    network.on_frame = lambda frame: replace(frame, payload=b"garbled") if frame.sender == "server" else frame
    await stream.send(b"x", [b"clean"])
    assert await stream.receive() == (b"x", bytearray(b"garbled"))

    def lose_first(frame: Frame) -> Frame | None:
        return None if frame.header == b"lost" else frame

    network.on_frame = lose_first
    await stream.send(b"lost")
    await stream.send(b"found")
    assert (await stream.receive())[0] == b"found"


async def test_delayed_frames_arrive_later_and_in_order(network: MemoryNetwork, clock: Clock) -> None:
    stream = await connected(network)
    network.delay(1800, "server")
    for number in b"1", b"2":
        await stream.send(number)
    answers = asyncio.create_task(receive_two(stream))
    await settle()
    clock.advance(1801)  # there
    await settle()
    clock.advance(1799)  # and back, but not quite
    await settle()
    assert not answers.done()
    clock.advance(2)
    assert await answers == [b"1", b"2"]


async def receive_two(stream: Stream) -> list[bytes]:
    return [(await stream.receive())[0], (await stream.receive())[0]]


async def test_a_sender_that_is_faster_than_the_receiver_waits(network: MemoryNetwork) -> None:
    client, server = network.node("client"), network.node("server")
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def hold(stream: Stream) -> None:
        accepted.set_result(stream)
        await done.wait()

    await server.transport.listen(hold)
    stream = await client.transport.open("server")
    for _ in range(QUEUE_FRAMES):
        await stream.send(b"x")
    blocked = asyncio.create_task(stream.send(b"one too many"))
    await asyncio.sleep(0)
    assert not blocked.done()
    await (await accepted).receive()
    await blocked
    done.set()


async def test_what_was_sent_before_a_close_is_still_received(network: MemoryNetwork) -> None:
    client, server = network.node("client"), network.node("server")

    async def say_goodbye(stream: Stream) -> None:
        await stream.send(b"goodbye")

    await server.transport.listen(say_goodbye)
    stream = await client.transport.open("server")
    await asyncio.sleep(0)
    await server.transport.close()
    assert (await stream.receive())[0] == b"goodbye"
    with pytest.raises(StreamBroken):
        await stream.receive()


async def test_a_handler_that_raises_only_ends_its_own_stream(network: MemoryNetwork) -> None:
    client, server = network.node("client"), network.node("server")

    async def fail(stream: Stream) -> None:
        raise RuntimeError("a bug")

    await server.transport.listen(fail)
    with pytest.raises(StreamBroken):
        await (await client.transport.open("server")).receive()
    await server.transport.listen(echo)
    stream = await client.transport.open("server")
    await stream.send(b"still here")
    assert (await stream.receive())[0] == b"still here"


async def test_a_frame_beyond_the_limits_is_not_sent(network: MemoryNetwork) -> None:
    stream = await connected(network)
    with pytest.raises(ProtocolViolation):
        await stream.send(bytes(MAX_HEADER_BYTES + 1))


async def test_all_peers_see_announcements_until_they_are_replaced_or_expire(
    network: MemoryNetwork, clock: Clock
) -> None:
    one, other = network.node("one").directory, network.node("other").directory
    await one.announce(MODEL, info("one"), lifetime=60)
    await one.announce(MODEL, info("one", state=ServerState.LEAVING), lifetime=5)
    await other.announce(MODEL, info("other", 4, 8), lifetime=60)
    assert await other.servers(MODEL) == (info("one", state=ServerState.LEAVING), info("other", 4, 8))
    assert await one.models() == (MODEL,)
    clock.advance(6)
    assert await one.servers(MODEL) == (info("other", 4, 8),)


async def test_a_peer_cannot_announce_another(network: MemoryNetwork) -> None:
    with pytest.raises(ValueError, match="announces itself"):
        await network.node("one").directory.announce(MODEL, info("other"), lifetime=60)


async def test_a_refused_header_ends_receiving_and_not_sending() -> None:
    network = MemoryNetwork()
    client, server = network.node("client").transport, network.node("server").transport

    async def refusing(stream: Stream) -> None:
        def check_header(header: bytes, payload_bytes: int) -> None:
            raise ProtocolViolation(f"{header!r} and {payload_bytes} bytes")

        for expected in (ProtocolViolation, StreamBroken):
            with pytest.raises(expected):
                await stream.receive(check_header)
        await stream.send(b"refused")

    await server.listen(refusing)
    stream = await client.open("server")
    await stream.send(b"hello", [b"payload"])
    assert (await stream.receive())[0] == b"refused"
