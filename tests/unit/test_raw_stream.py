"""Frames on a raw stream: the header is looked at before the payload is taken, and unfinished ones have limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shoal.net.libp2p.raw_stream import Libp2pStream
from shoal.net.transport import CHUNK_BYTES, StreamBroken
from shoal.net.wire import codec
from shoal.net.wire.frames import PREFIX_BYTES, pack_prefix
from shoal.net.wire.unfinished_frames import UnfinishedFrames
from shoal.protocol import REQUEST_KINDS, SESSION_KINDS, AnyMessage, Forward, Ping, ProtocolViolation, StepResult, dump
from shoal.tensors import TensorSpec

pytestmark = pytest.mark.anyio

MIB = 1 << 20


class Wire:
    """What a daemon would hand over: bytes that have come, and bytes that are written."""

    def __init__(self, *, peer: str = "peer", unfinished: UnfinishedFrames | None = None) -> None:
        self.reader = asyncio.StreamReader(limit=256 * 1024)
        self.reader.set_transport(self)  # type: ignore[arg-type]
        self.transport: Any = self
        self.written = bytearray()
        self.closed = False
        self.stream = Libp2pStream(peer, self.reader, self, unfinished=unfinished)  # type: ignore[arg-type]

    def come(self, data: bytes) -> None:
        self.reader.feed_data(data)

    @property
    def untouched(self) -> int:
        """The bytes that have come and that nobody took."""
        return len(self.reader._buffer)  # type: ignore[attr-defined]

    # what a StreamWriter and its transport are asked for

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


async def soon(act: Any) -> Any:
    """What it comes to, or a failure instead of waiting for ever."""
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
async def test_a_frame_is_refused_by_its_header_before_anything_of_the_payload_is_taken(header: bytes, payload: int):
    wire = Wire()
    wire.come(head(header, payload) + bytes(1000))
    with pytest.raises(ProtocolViolation):
        await soon(codec.receive(wire.stream, REQUEST_KINDS))
    assert wire.untouched == 1000
    await wire.stream.send(b"that is refused")  # an answer can be sent still, and nothing more be received
    assert wire.written.endswith(b"that is refused")
    with pytest.raises(StreamBroken):
        await soon(codec.receive(wire.stream, REQUEST_KINDS))


async def test_only_messages_that_make_sense_in_a_session_are_taken_there():
    wire = Wire()
    wire.come(head(dump(forward()), 4 * MIB))
    with pytest.raises(ProtocolViolation, match="forward"):
        await soon(codec.receive(wire.stream, SESSION_KINDS))


async def test_what_is_admitted_arrives_whole_also_after_a_cancelled_receive():
    wire, message = Wire(), forward(256, 512)
    data = bytes(range(256)) * (message.payload_bytes // 256)
    wire.come(head(dump(message), len(data)) + data[: 3 * PREFIX_BYTES])
    receiving = asyncio.create_task(codec.receive(wire.stream, REQUEST_KINDS))
    for _ in range(5):
        await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    wire.come(data[3 * PREFIX_BYTES :])
    received, tensors = await soon(codec.receive(wire.stream, REQUEST_KINDS))
    assert received == message
    assert tensors["hidden"].numpy().tobytes() == data


async def taken_of(wires: list[Wire], num_bytes: int) -> tuple[int, list[asyncio.Task[Any]]]:
    """How much is taken of so many bytes on each of these, and who waits for the rest."""
    tasks = [asyncio.create_task(codec.receive(wire.stream, REQUEST_KINDS)) for wire in wires]
    for wire in wires:
        wire.come(bytes(num_bytes))
    for _ in range(2 * num_bytes // CHUNK_BYTES + 10):
        await asyncio.sleep(0)
    return sum(num_bytes - wire.untouched for wire in wires), tasks


async def ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_of_one_peer_not_more_is_taken_than_a_payload_may_have_however_many_streams_it_has():
    unfinished = UnfinishedFrames(8 * MIB)
    many = [Wire(unfinished=unfinished) for _ in range(40)]
    other = Wire(peer="another", unfinished=unfinished)
    for wire in (*many, other):
        wire.come(head(dump(forward()), 4 * MIB))
    taken, tasks = await taken_of(many, 2 * MIB)
    assert taken == 2 * 2 * MIB
    ((from_other, more), small) = await taken_of([other], 2 * MIB), Wire(unfinished=unfinished)
    assert from_other == 2 * MIB
    small.come(head(dump(forward(1, 16)), 64) + bytes(64))
    await soon(codec.receive(small.stream, REQUEST_KINDS))  # small frames need no room
    await ended(*tasks, *more)


async def test_a_frame_that_waits_for_room_is_taken_when_another_one_is_whole_or_its_stream_ends():
    unfinished = UnfinishedFrames(4 * MIB)
    wires = [Wire(unfinished=unfinished) for _ in range(4)]
    for wire in wires:
        wire.come(head(dump(forward()), 4 * MIB))
    first, second, third, fourth = (asyncio.create_task(codec.receive(w.stream, REQUEST_KINDS)) for w in wires)
    for wire in wires:
        wire.come(bytes(4 * MIB))
    await soon(first)
    await soon(second)
    await ended(third)
    await wires[2].stream.close()
    await soon(fourth)
    largest = Wire(unfinished=unfinished)
    largest.come(head(dump(forward(1024, 4096)), 16 * MIB) + bytes(16 * MIB))
    await soon(codec.receive(largest.stream, REQUEST_KINDS))  # by itself, whatever its size
    assert not unfinished._shares


async def test_whoever_stops_waiting_for_room_leaves_its_place_to_the_next():
    unfinished = UnfinishedFrames(10)
    await unfinished.take("peer", 6)
    large = asyncio.create_task(unfinished.take("peer", 8))
    small = asyncio.create_task(unfinished.take("peer", 4))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not small.done()  # it came later
    await ended(large)
    await soon(small)
    leaving = asyncio.create_task(unfinished.take("peer", 5))
    await asyncio.sleep(0)
    unfinished.give_back("peer", 6)
    leaving.cancel()  # at the moment when it is let in
    await asyncio.gather(leaving, return_exceptions=True)
    unfinished.give_back("peer", 4)
    assert not unfinished._shares
