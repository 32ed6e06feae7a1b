"""A decoded frame is what was encoded; any other bytes raise `ProtocolViolation`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.lines import Line
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import SLOWEST_LINK, HeaderCheck, Stream
from shoal.net.wire.codec import decode, encode, receive, send
from shoal.net.wire.frames import pack_prefix, unpack_prefix
from shoal.protocol import (
    FAILURES,
    MAX_FACTORS,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    AnyMessage,
    Backward,
    Close,
    Failure,
    FailureCode,
    Forward,
    PassResult,
    ProtocolViolation,
    Rewind,
    Step,
    dump,
    parse,
)
from shoal.tensors import TENSOR_ALIGNMENT

from . import virtual_time

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = draw(st.binary(min_size=size, max_size=size))
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and tensor.dim() > 1 else tensor


words = st.text(st.characters(categories=["L", "N", "P"]), max_size=20)
spans = {"model": words, "fingerprint": words, "start": st.just(0), "end": st.just(2)}
messages: st.SearchStrategy[AnyMessage] = st.one_of(
    st.builds(
        Step,
        epoch=st.integers(0, (1 << 53) - 1),
        position=st.integers(0, 1 << 22),
        hops_left=st.integers(0, 256),
        link=st.none() | st.just("0123456789abcdef" * 2),
    ),
    st.builds(Rewind, epoch=st.integers(0, 9), position=st.integers(0, 1 << 22), rows=st.none() | st.just((3, 1, 1))),
    st.builds(Forward, **spans),
    st.builds(Backward, **spans),
    st.builds(Failure, code=st.just("busy"), reason=words, retry_after=st.floats(0, 3600)),
    st.builds(
        PassResult, unused=st.sets(st.integers(0, MAX_FACTORS - 1), max_size=20).map(lambda found: tuple(sorted(found)))
    ),
    st.just(Close()),
)


@st.composite
def frames(draw: st.DrawFn) -> tuple[AnyMessage, dict[Any, torch.Tensor]]:
    """A message and tensors that it may carry."""
    message = draw(messages)
    names = draw(st.lists(st.sampled_from(message.carries), unique=True, max_size=4)) if message.carries else []
    return message, {name: draw(tensors()) for name in names}


def joined(buffers: list[Any]) -> bytearray:
    return bytearray(b"".join(buffers))


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(frames())
def test_a_message_and_its_tensors_come_back_bit_by_bit(frame: tuple[AnyMessage, dict[Any, torch.Tensor]]) -> None:
    message, given_tensors = frame
    header, buffers = encode(message, given_tensors)
    decoded, received = decode(header, joined(buffers))
    assert decoded.model_copy(update={"tensors": ()}) == message
    assert list(received) == list(given_tensors)
    for name, tensor in given_tensors.items():
        assert (received[name].dtype, received[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(received[name]) == as_bytes(tensor)


@given(frames(), st.integers(1, 64))
def test_a_payload_of_another_length_is_refused(frame: tuple[AnyMessage, dict[Any, torch.Tensor]], extra: int) -> None:
    header, buffers = encode(*frame)
    payload = joined(buffers)
    with pytest.raises(ProtocolViolation):
        decode(header, payload + bytes(extra))
    if payload:
        with pytest.raises(ProtocolViolation):
            decode(header, payload[: -min(extra, len(payload))])


@given(frames(), st.data())
def test_a_garbled_header_is_refused_or_still_a_valid_message(
    frame: tuple[AnyMessage, dict[Any, torch.Tensor]], data: st.DataObject
) -> None:
    header, buffers = encode(*frame)
    garbled = bytearray(header)
    for position in data.draw(st.lists(st.integers(0, len(header) - 1), min_size=1, max_size=4)):
        garbled[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolViolation):
        decode(garbled, joined(buffers))


@given(messages, st.integers(0, 200))
def test_a_truncated_header_is_refused(message: AnyMessage, length: int) -> None:
    header, _ = encode(message, {})
    with pytest.raises(ProtocolViolation):
        decode(header[: min(length, len(header) - 1)], bytearray())


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_noise_is_refused(header: bytes, payload: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode(header, bytearray(payload))


def declared(**spec: Any) -> bytes:
    tensor = {"name": "hidden", "dtype": "float32", "shape": [1, 1, 4]} | spec
    return json.dumps({"kind": "step_result", "tensors": [tensor]}).encode()


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": [0]},
        {"shape": [-1, 4]},
        {"shape": [1 << 22] * 4},
        {"shape": [1, 1, 1, 1, 4]},
        {"shape": [2.0, 2]},
        {"shape": ["4"]},
        {"shape": None},
        {"dtype": "object"},
        {"dtype": "float64"},
        {"name": "weights"},
        {"offset": 0},
    ],
)
def test_a_tensor_that_no_message_has_is_refused(spec: dict[str, Any]) -> None:
    decode(declared(), bytearray(TENSOR_ALIGNMENT))
    with pytest.raises(ProtocolViolation):
        decode(declared(**spec), bytearray(TENSOR_ALIGNMENT))


@pytest.mark.parametrize(
    "header",
    [
        b'{"kind":"step_result","tensors":[],"extra":1}',
        b'{"kind":"unknown"}',
        b'{"position":1}',
        b'{"kind":"step","position":NaN}',
        b'{"kind":"step","position":true}',
        b'{"kind":"step","position":1e400}',
        b'{"kind":"failure","code":"busy","reason":"x","retry_after":Infinity}',
        b"[" * 60_000,
        b'{"kind":"close"}' + b" " * MAX_HEADER_BYTES,
        b"\xff\xfe",
        b"null",
    ],
)
def test_a_header_that_is_no_message_is_refused_in_one_short_line(header: bytes) -> None:
    with pytest.raises(ProtocolViolation) as violation:
        decode(header, bytearray())
    assert len(str(violation.value)) < 400
    assert "\n" not in str(violation.value)


def test_a_result_has_room_for_all_factors_that_are_unused() -> None:
    result = PassResult(unused=tuple(range(MAX_FACTORS)))
    assert parse(dump(result)) == result
    beyond = json.dumps({"kind": "pass_result", "unused": "0" * (MAX_FACTORS // 4 + 2)})
    with pytest.raises(ProtocolViolation, match="not up to 200000 bits"):
        parse(beyond.encode())


@pytest.mark.parametrize("unused", [[1, 2], 7, "xy", "abc"])
def test_what_is_unused_is_said_in_bits(unused: Any) -> None:
    with pytest.raises(ProtocolViolation, match="pass_result: unused"):
        parse(json.dumps({"kind": "pass_result", "unused": unused}).encode())


def test_only_computations_carry_tensors() -> None:
    header, buffers = encode(Close(), {"hidden": torch.ones(4)})
    with pytest.raises(ProtocolViolation, match="close: Value error, it carries no hidden"):
        decode(header, joined(buffers))


@pytest.mark.parametrize("reason", ["\x1b[2J", "two\nlines", "\u202edesrever", "\u2028", "\0"])
def test_a_reason_that_would_upset_a_terminal_is_refused(reason: str) -> None:
    with pytest.raises(ProtocolViolation) as violation:
        decode(json.dumps({"kind": "failure", "code": "broken", "reason": reason}).encode(), bytearray())
    assert str(violation.value).isprintable()


@given(st.text(), st.text())
def test_what_was_sent_is_not_repeated(word: str, value: str) -> None:
    for header in ({"kind": f"?{word}"}, {"kind": "close", f"?{word}": 1}, {"kind": "step", "position": value}):
        with pytest.raises(ProtocolViolation) as violation:
            decode(json.dumps(header).encode(), bytearray())
        assert str(violation.value).isprintable()


def test_a_tensor_cannot_be_declared_twice() -> None:
    tensor = {"name": "hidden", "dtype": "uint8", "shape": [16]}
    header = json.dumps({"kind": "step_result", "tensors": [tensor, tensor]}).encode()
    with pytest.raises(ProtocolViolation, match="twice"):
        decode(header, bytearray(32))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_lengths_are_packed_and_unpacked_or_refused(header: int, payload: int) -> None:
    if header <= MAX_HEADER_BYTES and payload <= MAX_PAYLOAD_BYTES:
        assert unpack_prefix(pack_prefix(header, payload)) == (header, payload)
        return
    with pytest.raises(ProtocolViolation):
        pack_prefix(header, payload)
    with pytest.raises(ProtocolViolation):
        unpack_prefix(header.to_bytes(4, "big") + payload.to_bytes(8, "big"))


@pytest.mark.anyio
async def test_messages_are_sent_over_a_stream() -> None:
    network = MemoryNetwork()
    client, server = network.node("client").transport, network.node("server").transport

    async def answer(stream: Stream) -> None:
        message, given_tensors = await receive(stream)
        await send(stream, message, {"hidden": given_tensors["hidden"] * 2})

    await server.listen(answer)
    stream = await client.open("server")
    request = Forward(model="m", fingerprint="f", start=0, end=1)
    await send(stream, request, {"hidden": torch.ones(1, 3, 2, dtype=torch.bfloat16)})
    message, received = await receive(stream)
    assert isinstance(message, Forward)
    assert torch.equal(received["hidden"], torch.full((1, 3, 2), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(("num_bytes", "seconds"), [(2 * SLOWEST_LINK, 2.0), (1024, None)])
def test_while_a_large_message_comes_its_line_says_by_when_it_has_to_be_here(
    num_bytes: int, seconds: float | None
) -> None:
    header, buffers = encode(Step(epoch=0, position=0), {"hidden": torch.zeros(num_bytes, dtype=torch.uint8)})

    class Arriving:
        line, until = Line(), None

        async def receive(self, check_header: HeaderCheck) -> tuple[bytes, bytearray]:
            await asyncio.sleep(7.0)
            check_header(header, num_bytes)
            self.until = self.line.arriving_until
            return header, bytearray(b"".join(buffers))

    stream = Arriving()
    virtual_time.run(receive(stream))  # type: ignore[arg-type]
    assert stream.until == (None if seconds is None else pytest.approx(7.0 + seconds))
    assert stream.line.arriving_until is None


def test_the_client_has_an_error_for_every_code_of_a_failure() -> None:
    assert set(FAILURES) == set(get_args(FailureCode))
