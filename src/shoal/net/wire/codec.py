"""Messages and tensors to frames and back. Little-endian bytes: nothing is executed, nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

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
    """A message and its tensors as a header and buffers, which share the tensors' memory where they can.

    Tensors that `encoding` would not make smaller travel raw.
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
    """What travels of a tensor, in this order."""
    match encoding:
        case "raw":
            return (tensor,)
        case "bfloat16":
            return (converted(tensor, torch.bfloat16),)
        case "int8":
            steps, peaks = to_int8(tensor)
            return peaks, steps


def packed(tensor: torch.Tensor, encoding: Encoding) -> tuple[TensorSpec, bytearray]:
    """A tensor by itself, as bytes that share no memory with it, and what `unpacked` needs to know of it."""
    spec = _spec_of("hidden", tensor, encoding)
    return spec, bytearray().join(_bytes_of(part) for part in _encoded(tensor.detach(), spec.encoding))


def _bytes_of(tensor: torch.Tensor) -> Buffer:
    """A tensor's own memory, if it is in one piece."""
    buffer: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return buffer


def decode(header: bytes | bytearray, payload: bytearray) -> tuple[AnyMessage, dict[TensorName, torch.Tensor]]:
    """What `encode` was given, or `as_received` of it. Raw tensors share the payload's memory.

    Raises `ProtocolViolation` unless the payload is exactly what the header declares.
    """
    message = announced(header, len(payload))
    return message, _tensors(message, payload)


def announced(header: bytes | bytearray, payload_bytes: int, kinds: Collection[str] | None = None) -> AnyMessage:
    """The message of a frame with so long a payload, which need not be here yet.

    Raises `ProtocolViolation` unless the payload is exactly as long as the header declares, and for one of other kinds.
    """
    message = parse(header)
    if payload_bytes and kinds is not None and message.kind not in kinds:  # others take no room
        raise ProtocolViolation(f"a message of kind {message.kind!r} makes no sense here")
    if message.payload_bytes != payload_bytes:
        raise ProtocolViolation(f"{message.payload_bytes} bytes declared, {payload_bytes} sent")
    return message


def _tensors(message: AnyMessage, payload: bytearray) -> dict[TensorName, torch.Tensor]:
    tensors: dict[TensorName, torch.Tensor] = {}
    offset = 0
    for spec in message.tensors:
        tensors[spec.name] = unpacked(spec, payload, offset)
        offset += spec.aligned_nbytes
    return tensors


def unpacked(spec: TensorSpec, payload: bytearray, offset: int = 0) -> torch.Tensor:
    """The tensor that begins there; a raw one shares the payload's memory."""

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
    stream: Stream, kinds: Collection[str] | None = None
) -> tuple[AnyMessage, dict[TensorName, torch.Tensor]]:
    """The next message, of one of these kinds.

    Raises `StreamBroken`, or `ProtocolViolation` for bytes that are none. That is found out by the header, before the
    payload is taken.
    """
    admitted: list[AnyMessage] = []  # parsed once, unless a receive was cancelled in the middle of a frame

    def admit(header: bytes, payload_bytes: int) -> None:
        admitted.append(announced(header, payload_bytes, kinds))

    _, payload = await stream.receive(admit)
    (message,) = admitted
    return message, _tensors(message, payload)
