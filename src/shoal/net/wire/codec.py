"""Turns messages and tensors into frames and back. Tensors travel as little-endian bytes, never as pickled objects."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.net.lines import SharedLine
from shoal.net.transport import SLOWEST_LINK, Buffer, Stream
from shoal.net.wire import frames
from shoal.net.wire.encodings import converted, from_int8, to_int8
from shoal.net.wire.packing import pack, unpack
from shoal.policy.network.goodput import LARGE_BYTES, Begun
from shoal.protocol import AnyMessage, ProtocolViolation, dump, parse
from shoal.tensors import DTYPE_BYTES, ENCODED, LOSSY, Encoding, TensorName, TensorSpec

THREAD_BYTES = 1 << 20
"""Larger tensors are packed and unpacked on a thread: it takes more than a millisecond, and a thread's turn less."""

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Tensors = Mapping[TensorName, torch.Tensor]


@dataclass(frozen=True)
class _Encoded:
    """One tensor as it is sent."""

    spec: TensorSpec
    buffers: Sequence[Buffer]


def encode(
    message: AnyMessage,
    tensors: Tensors,
    encoding: Encoding = "raw",
    *,
    packed: Collection[TensorName] = (),
) -> tuple[bytes, list[Buffer]]:
    """A message and its tensors as a header and buffers, which share the tensors' memory where possible.

    A tensor that `encoding` would not make smaller is sent raw. Those that are `packed` are packed if that pays.
    """
    found = [_encode(name, tensor, encoding) for name, tensor in tensors.items()]
    return _frame(message, [_pack(each) if each.spec.name in packed else each for each in found], None)


def _frame(message: AnyMessage, found: Sequence[_Encoded], goodput: int | None) -> tuple[bytes, list[Buffer]]:
    buffers: list[Buffer] = []
    for each in found:
        buffers.extend(each.buffers)
        if padding := each.spec.aligned_nbytes - each.spec.nbytes:
            buffers.append(bytes(padding))
    specs = tuple(each.spec for each in found)
    return dump(message.model_copy(update={"tensors": specs, "goodput": goodput})), buffers


def _encode(name: TensorName, tensor: torch.Tensor, encoding: Encoding) -> _Encoded:
    spec = _spec_of(name, tensor, encoding)
    return _Encoded(spec, [_bytes_of(part) for part in _parts(tensor.detach().cpu(), spec.encoding)])


def _pack(encoded: _Encoded) -> _Encoded:
    """The same tensor packed, if it can be and that pays."""
    if not encoded.spec.can_pack:
        return encoded
    (content,) = encoded.buffers
    buffers = pack(content, DTYPE_BYTES[encoded.spec.encoded_dtype])
    if buffers is None:
        return encoded
    return _Encoded(encoded.spec.model_copy(update={"packed": frames.payload_bytes(buffers)}), buffers)


def _spec_of(name: TensorName, tensor: torch.Tensor, encoding: Encoding) -> TensorSpec:
    dtype = _NAMES[tensor.dtype]
    fits = name in ENCODED and dtype in LOSSY.get(encoding, ())
    return TensorSpec.model_construct(
        name=name, dtype=dtype, shape=tuple(tensor.shape), encoding=encoding if fits else "raw"
    )


def _parts(tensor: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, ...]:
    """The parts of an encoded tensor, in the order in which they are sent."""
    match encoding:
        case "raw":
            return (tensor,)
        case "bfloat16":
            return (converted(tensor, torch.bfloat16),)
        case "int8":
            steps, peaks = to_int8(tensor)
            return peaks, steps


def pack_tensor(tensor: torch.Tensor, encoding: Encoding) -> tuple[TensorSpec, bytearray]:
    """One tensor as bytes, which share no memory with it, and the spec by which `unpack_tensor` reads them."""
    spec = _spec_of("hidden", tensor, encoding)
    return spec, bytearray().join(_bytes_of(part) for part in _parts(tensor.detach(), spec.encoding))


def _bytes_of(tensor: torch.Tensor) -> Buffer:
    """The bytes of a tensor; they share its memory if it is contiguous."""
    buffer: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return buffer


def decode(header: bytes | bytearray, payload: bytearray) -> tuple[AnyMessage, dict[TensorName, torch.Tensor]]:
    """The reverse of `encode`. Lossy encodings give `as_received` of a tensor; raw tensors share the payload's memory.

    Raises `ProtocolViolation` unless the payload is exactly what the header declares.
    """
    message = parse_header(header, len(payload))
    return message, _tensors(message, payload)


def parse_header(header: bytes | bytearray, payload_bytes: int, kinds: Collection[str] | None = None) -> AnyMessage:
    """The message of a frame, before its payload of `payload_bytes` has been received.

    Raises `ProtocolViolation` unless the payload has exactly the length that the header declares, and for a payload
    of a message that is none of these `kinds`.
    """
    message = parse(header)
    if payload_bytes and kinds is not None and message.kind not in kinds:  # without a payload, the caller decides
        raise ProtocolViolation(f"a message of kind {message.kind!r} makes no sense here")
    if message.payload_bytes != payload_bytes:
        raise ProtocolViolation(f"{message.payload_bytes} bytes declared, {payload_bytes} sent")
    return message


def _tensors(message: AnyMessage, payload: bytearray) -> dict[TensorName, torch.Tensor]:
    tensors: dict[TensorName, torch.Tensor] = {}
    offset = 0
    for spec in message.tensors:
        tensors[spec.name] = unpack_tensor(spec, payload, offset)
        offset += spec.aligned_nbytes
    return tensors


def unpack_tensor(spec: TensorSpec, payload: bytearray, offset: int = 0) -> torch.Tensor:
    """The tensor whose bytes begin at `offset`. A raw one shares the payload's memory, unless it is packed.

    Raises `ProtocolViolation` for bytes that are no packed tensor.
    """
    dtype, count = _DTYPES[spec.dtype], math.prod(spec.shape)
    if spec.packed is not None:
        packed = memoryview(payload)[offset : offset + spec.packed]
        payload, offset = unpack(packed, count=count, width=DTYPE_BYTES[spec.encoded_dtype]), 0

    def part(dtype: torch.dtype, count: int, start: int = offset) -> torch.Tensor:
        return torch.frombuffer(payload, dtype=dtype, count=count, offset=start)

    match spec.encoding:
        case "raw":
            return part(dtype, count).view(spec.shape)
        case "bfloat16":
            return converted(part(torch.bfloat16, count), dtype).view(spec.shape)
        case "int8":
            peaks = part(torch.bfloat16, spec.num_peaks)
            steps = part(torch.int8, count, offset + peaks.nbytes)
            return from_int8(steps.view(spec.shape), peaks.view(*spec.shape[:-1], -1), dtype)


async def send(
    stream: Stream,
    message: AnyMessage,
    tensors: Tensors | None = None,
    encoding: Encoding = "raw",
    *,
    packs: bool | None = None,
) -> None:
    """Send one message. Raises `StreamBroken`.

    Where it is faster, tensors are packed, if the other side unpacks them: `packs` says whether it does, and that this
    side wants it. Without, it does if it has told its goodput over this stream. It is told this side's too then.
    """
    tensors, line = tensors or {}, stream.line
    if not (line.is_told if packs is None else packs):
        await stream.send(*encode(message, tensors, encoding))
        return
    raw = [_encode(name, tensor, encoding) for name, tensor in tensors.items()]
    found = await _packed(raw, line.shared)
    is_large = sum(each.spec.encoded_nbytes for each in raw) >= LARGE_BYTES
    tells = is_large or line.shared.has_news or not line.has_told
    await stream.send(*_frame(message, found, line.tell() if tells else None))


async def _packed(raw: Sequence[_Encoded], line: SharedLine) -> list[_Encoded]:
    """The same tensors; those are packed that will be there sooner."""
    found: list[_Encoded] = []
    for each in raw:
        dtype, num_bytes = each.spec.encoded_dtype, each.spec.encoded_nbytes
        if each.spec.can_pack and line.packs(dtype, num_bytes):
            began = time.perf_counter()  # waiting for the thread counts: a busy machine is a slow coder
            each = _pack(each) if num_bytes <= THREAD_BYTES else await asyncio.to_thread(_pack, each)
            line.packed(dtype, num_bytes, each.spec.nbytes, time.perf_counter() - began)
        found.append(each)
    return found


async def receive(
    stream: Stream, kinds: Collection[str] | None = None, check: Callable[[AnyMessage], None] = lambda message: None
) -> tuple[AnyMessage, dict[TensorName, torch.Tensor]]:
    """The next message and its tensors. If this is cancelled, nothing more can be received.

    Raises `StreamBroken`, and `ProtocolViolation` for bytes that are no message or for a payload of a message of
    another kind. The header decides that, before any of the payload is read. `check` may refuse a message by its
    header too: what it raises is raised.
    """
    parsed: list[AnyMessage] = []
    line, clock = stream.line, asyncio.get_running_loop().time
    frame: Begun | None = None

    def check_header(header: bytes, payload_bytes: int) -> None:
        nonlocal frame
        message = parse_header(header, payload_bytes, kinds)
        check(message)
        parsed[:] = [message]
        if message.goodput is not None:
            line.told(message.goodput)
        frame = line.shared.begin(payload_bytes, now=clock())
        line.arriving_until = None if frame is None else clock() + payload_bytes / SLOWEST_LINK

    num_received = 0
    try:
        _, payload = await stream.receive(check_header)
        num_received = len(payload)
    finally:
        line.arriving_until = None
        if frame is not None:
            line.shared.end(frame, num_received, now=clock())
    (message,) = parsed
    if sum(spec.encoded_nbytes for spec in message.tensors if spec.packed is not None) > THREAD_BYTES:
        return message, await asyncio.to_thread(_tensors, message, payload)
    return message, _tensors(message, payload)
