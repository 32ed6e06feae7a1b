"""Turns messages and tensors into frames and back. Tensors travel as little-endian bytes, never as pickled objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch

from shoal.net.transport import Buffer, Stream
from shoal.net.wire.encodings import converted, from_int8, to_int8
from shoal.protocol import AnyMessage, ProtocolViolation, dump, parse
from shoal.tensors import ENCODED, LOSSY, Encoding, TensorName, TensorSpec

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Tensors = Mapping[TensorName, torch.Tensor]


def encode(message: AnyMessage, tensors: Tensors, encoding: Encoding = "raw") -> tuple[bytes, list[Buffer]]:
    """A message and its tensors as a header and buffers, which share the tensors' memory where possible.

    A tensor that `encoding` would not make smaller is sent raw.
    """
    specs: list[TensorSpec] = []
    buffers: list[Buffer] = []
    for name, tensor in tensors.items():
        spec = _spec_of(name, tensor, encoding)
        specs.append(spec)
        buffers.extend(_bytes_of(part) for part in _encoded(tensor.detach().cpu(), spec.encoding))
        if padding := spec.aligned_nbytes - spec.nbytes:
            buffers.append(bytes(padding))
    return dump(message.model_copy(update={"tensors": tuple(specs)})), buffers


def _spec_of(name: TensorName, tensor: torch.Tensor, encoding: Encoding) -> TensorSpec:
    dtype = _NAMES[tensor.dtype]
    fits = name in ENCODED and dtype in LOSSY.get(encoding, ())
    return TensorSpec.model_construct(
        name=name, dtype=dtype, shape=tuple(tensor.shape), encoding=encoding if fits else "raw"
    )


def _encoded(tensor: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, ...]:
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
    return spec, bytearray().join(_bytes_of(part) for part in _encoded(tensor.detach(), spec.encoding))


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
    """The tensor whose bytes begin at `offset`. A raw one shares the payload's memory."""

    def part(dtype: torch.dtype, count: int, start: int = offset) -> torch.Tensor:
        return torch.frombuffer(payload, dtype=dtype, count=count, offset=start)

    dtype, count = _DTYPES[spec.dtype], math.prod(spec.shape)
    match spec.encoding:
        case "raw":
            return part(dtype, count).view(spec.shape)
        case "bfloat16":
            return converted(part(torch.bfloat16, count), dtype).view(spec.shape)
        case "int8":
            peaks = part(torch.bfloat16, spec.num_peaks)
            steps = part(torch.int8, count, offset + peaks.nbytes)
            return from_int8(steps.view(spec.shape), peaks.view(*spec.shape[:-1], -1), dtype)


async def send(stream: Stream, message: AnyMessage, tensors: Tensors | None = None, encoding: Encoding = "raw") -> None:
    """Send one message. Raises `StreamBroken`."""
    header, payload = encode(message, tensors or {}, encoding)
    await stream.send(header, payload)


async def receive(
    stream: Stream, kinds: Collection[str] | None = None, check: Callable[[AnyMessage], None] = lambda message: None
) -> tuple[AnyMessage, dict[TensorName, torch.Tensor]]:
    """The next message and its tensors.

    Raises `StreamBroken`, and `ProtocolViolation` for bytes that are no message or for a payload of a message of
    another kind. The header decides that, before any of the payload is read. `check` may refuse a message by its
    header too: what it raises is raised.
    """
    parsed: list[AnyMessage] = []

    def check_header(header: bytes, payload_bytes: int) -> None:
        message = parse_header(header, payload_bytes, kinds)
        check(message)
        parsed[:] = [message]

    _, payload = await stream.receive(check_header)
    (message,) = parsed
    return message, _tensors(message, payload)
