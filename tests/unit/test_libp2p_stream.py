"""Frames on a raw stream: the header is checked before the payload is read, and incomplete frames have a budget."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.transport import CHUNK_BYTES, StreamBroken
from shoal.net.wire import codec
from shoal.net.wire.frames import PREFIX_BYTES, pack_prefix
from shoal.net.wire.receive_budget import ReceiveBudget, Reservation
from shoal.policy.network import frame_room
from shoal.policy.network.frame_room import MAX_WAITING_OF_NETWORK, Frame
from shoal.protocol import REQUEST_KINDS, SESSION_KINDS, AnyMessage, Forward, Ping, ProtocolViolation, StepResult, dump
from shoal.tensors import TensorSpec

pytestmark = pytest.mark.anyio

MIB = 1 << 20


class Wire:
    """A stream, and the bytes that the daemon has delivered to it and taken from it."""

    def __init__(self, *, peer: str = "peer", budget: ReceiveBudget | None = None, address: str | None = None) -> None:
        self.reader = asyncio.StreamReader(limit=256 * 1024)
        self.reader.set_transport(self)  # type: ignore[arg-type]
        self.transport: Any = self
        self.written = bytearray()
        self.closed = False
        self.stream = Libp2pStream(peer, self.reader, self, budget=budget, address=address)  # type: ignore[arg-type]

    def deliver(self, data: bytes) -> None:
        self.reader.feed_data(data)

    @property
    def num_unread(self) -> int:
        """The delivered bytes that the stream has not read."""
        return len(self.reader._buffer)  # type: ignore[attr-defined]  # asyncio does not publish the number

    # Called as a StreamWriter and its transport.

    def set_write_buffer_limits(self, high: int) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def forward(num_tokens: int = 1024, hidden: int = 1024) -> AnyMessage:
    spec = TensorSpec(name="hidden", dtype="float32", shape=(1, num_tokens, hidden))
    return Forward(model="m", fingerprint="f", start=0, end=1, tensors=(spec,))


def head(header: bytes, payload: int) -> bytes:
    return pack_prefix(len(header), payload) + header


async def all_room_of(budget: ReceiveBudget) -> None:
    """Wait until no frame has room or waits for it: one that is larger than the budget is received alone."""
    frame = Frame("another peer", "another network", 1 << 40, 0.0)
    reservation = await budget.acquire(frame, num_received=lambda: 0, give_way=lambda: None)
    assert reservation is not None
    budget.release(reservation)


async def soon(act: Any) -> Any:
    """The result, or a failure where the test would hang."""
    async with asyncio.timeout(5):
        return await act


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (b"no message", 200 * MIB),
        (dump(Ping()), 200 * MIB),
        (dump(forward(1, 16)), 200 * MIB),
        (dump(forward()), 4),
        (dump(StepResult(tensors=forward().tensors)), 4 * MIB),
    ],
    ids=["garbage", "a ping with a payload", "more than is declared", "less than is declared", "an answer"],
)
async def test_a_frame_is_refused_by_its_header_before_its_payload_is_read(header: bytes, payload: int):
    wire = Wire()
    wire.deliver(head(header, payload) + bytes(1000))
    with pytest.raises(ProtocolViolation):
        await soon(codec.receive(wire.stream, REQUEST_KINDS))
    assert wire.num_unread == 1000
    await wire.stream.send(b"that is refused")  # sending still works, receiving does not
    assert wire.written.endswith(b"that is refused")
    with pytest.raises(StreamBroken):
        await soon(codec.receive(wire.stream, REQUEST_KINDS))


async def test_a_session_receives_only_messages_of_a_session():
    wire = Wire()
    wire.deliver(head(dump(forward()), 4 * MIB))
    with pytest.raises(ProtocolViolation, match="forward"):
        await soon(codec.receive(wire.stream, SESSION_KINDS))


async def test_a_cancelled_receive_loses_nothing_of_the_frame():
    wire, message = Wire(), forward(256, 512)
    data = bytes(range(256)) * (message.payload_bytes // 256)
    wire.deliver(head(dump(message), len(data)) + data[: 3 * PREFIX_BYTES])
    receiving = asyncio.create_task(codec.receive(wire.stream, REQUEST_KINDS))
    for _ in range(5):
        await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    wire.deliver(data[3 * PREFIX_BYTES :])
    received, tensors = await soon(codec.receive(wire.stream, REQUEST_KINDS))
    assert received == message
    assert tensors["hidden"].numpy().tobytes() == data


async def read_of(wires: list[Wire], num_bytes: int) -> tuple[int, list[asyncio.Task[Any]]]:
    """Deliver this number of bytes to each stream. Returns how many were read, and the tasks that wait for the rest."""
    tasks = [asyncio.create_task(codec.receive(wire.stream, REQUEST_KINDS)) for wire in wires]
    for wire in wires:
        wire.deliver(bytes(num_bytes))
    for _ in range(2 * num_bytes // CHUNK_BYTES + 10):
        await asyncio.sleep(0)
    return sum(num_bytes - wire.num_unread for wire in wires), tasks


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_all_streams_of_one_peer_share_its_budget():
    budget = ReceiveBudget(max_bytes=64 * MIB, max_peer_bytes=8 * MIB)
    many = [Wire(budget=budget) for _ in range(40)]
    other = Wire(peer="another", budget=budget)
    for wire in (*many, other):
        wire.deliver(head(dump(forward()), 4 * MIB))
    num_read, tasks = await read_of(many, 2 * MIB)
    assert num_read == 2 * 2 * MIB
    from_other, more = await read_of([other], 2 * MIB)
    assert from_other == 2 * MIB
    await cancel(*tasks, *more)


async def test_all_peers_share_the_budget_and_a_token_of_another_network_does_not_wait():
    budget = ReceiveBudget(max_bytes=16 * MIB, max_peer_bytes=8 * MIB)
    many = [Wire(peer=f"p{n}", budget=budget, address=f"/ip4/8.8.8.{n}/tcp/1") for n in range(8)]
    for wire in many:
        wire.deliver(head(dump(forward()), 4 * MIB))
    num_read, tasks = await read_of(many, MIB)
    assert num_read == 4 * MIB  # of four frames
    token = Wire(peer="client", budget=budget, address="/ip4/9.9.9.9/tcp/1")
    token.deliver(head(dump(forward(1, 16384)), 65536) + bytes(65536))
    await soon(codec.receive(token.stream, REQUEST_KINDS))
    await cancel(*tasks)


async def test_a_frame_that_stops_coming_gives_way_to_one_that_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frame_room, "GRACE_SECONDS", 0.0)
    budget = ReceiveBudget(max_bytes=4 * MIB, max_peer_bytes=4 * MIB)
    stalled, waiting = Wire(peer="attacker", budget=budget), Wire(peer="client", budget=budget)
    for wire in stalled, waiting:
        wire.deliver(head(dump(forward()), 4 * MIB) + bytes(1000))
    first, second = (asyncio.create_task(codec.receive(wire.stream, REQUEST_KINDS)) for wire in (stalled, waiting))
    with pytest.raises(StreamBroken, match="others needed its room"):
        await soon(first)
    waiting.deliver(bytes(4 * MIB - 1000))
    await soon(second)
    await soon(all_room_of(budget))
    with pytest.raises(StreamBroken, match="was refused"):
        await soon(stalled.stream.receive())


async def test_a_network_whose_frames_wait_in_great_number_begins_no_more():
    budget = ReceiveBudget(max_bytes=4 * MIB, max_peer_bytes=4 * MIB)
    wires = [Wire(peer=f"p{n}", budget=budget, address="/ip4/8.8.8.8/tcp/1") for n in range(MAX_WAITING_OF_NETWORK + 2)]
    for wire in wires:
        wire.deliver(head(dump(forward()), 4 * MIB))
    *tasks, last = [asyncio.create_task(codec.receive(wire.stream, REQUEST_KINDS)) for wire in wires]
    with pytest.raises(StreamBroken, match="too much at a time"):
        await soon(last)
    await cancel(*tasks)


async def test_a_waiting_frame_is_received_when_another_is_complete_or_its_stream_ends():
    budget = ReceiveBudget(max_bytes=8 * MIB, max_peer_bytes=4 * MIB)
    wires = [Wire(budget=budget) for _ in range(4)]
    for wire in wires:
        wire.deliver(head(dump(forward()), 4 * MIB))
    first, second, third, fourth = (asyncio.create_task(codec.receive(w.stream, REQUEST_KINDS)) for w in wires)
    for wire in wires:
        wire.deliver(bytes(4 * MIB))
    await soon(first)
    await soon(second)
    await cancel(third)
    await wires[2].stream.close()
    await soon(fourth)
    largest = Wire(budget=budget)
    largest.deliver(head(dump(forward(1024, 4096)), 16 * MIB) + bytes(16 * MIB))
    await soon(codec.receive(largest.stream, REQUEST_KINDS))  # a frame of any size fits alone
    await soon(all_room_of(budget))


async def test_a_frame_that_stops_waiting_leaves_its_turn_to_the_next():
    budget = ReceiveBudget(max_bytes=10 * MIB, max_peer_bytes=10 * MIB)
    given_up: list[int] = []

    def acquire(size: int) -> asyncio.Task[Reservation | None]:
        frame = Frame("peer", "network", size * MIB, 0.0)
        acquiring = budget.acquire(frame, num_received=lambda: 0, give_way=lambda: given_up.append(size))
        return asyncio.create_task(acquiring)

    first = await soon(acquire(6))
    large = acquire(8)
    await asyncio.sleep(0)
    small = acquire(4)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not small.done()  # the large one came first
    await cancel(large)
    second = await soon(small)
    leaving = acquire(5)
    for _ in range(3):
        await asyncio.sleep(0)
    budget.release(first)
    leaving.cancel()  # at the moment of its admission
    await asyncio.gather(leaving, return_exceptions=True)
    budget.release(second)
    await soon(all_room_of(budget))
    assert not given_up
