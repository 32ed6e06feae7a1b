"""Messages and tensors to frames and back. Raw little-endian bytes: nothing is executed, nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.net.transport import Buffer, Stream
from shoal.protocol import (
    TENSOR_ALIGNMENT,
    Message,
    ProtocolViolation,
    TensorName,
    TensorSpec,
    dump,
    parse,
)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Tensors = Mapping[TensorName, torch.Tensor]


def encode(message: Message, tensors: Tensors) -> tuple[bytes, list[Buffer]]:
    """A message and its tensors as a header and buffers, which share the tensors' memory where they can."""
    specs: list[TensorSpec] = []
    buffers: list[Buffer] = []
    for name, tensor in tensors.items():
        spec = TensorSpec.model_construct(name=name, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape))
        specs.append(spec)
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        buffers.append(flat.numpy().data)
        if padding := -spec.nbytes % TENSOR_ALIGNMENT:
            buffers.append(bytes(padding))
    return dump(message.model_copy(update={"tensors": tuple(specs)})), buffers


def decode(header: bytes | bytearray, payload: bytearray) -> tuple[Message, dict[TensorName, torch.Tensor]]:
    """What `encode` was given. The tensors share the payload's memory.

    Raises `ProtocolViolation` unless the payload is exactly what the header declares.
    """
    message = parse(header)
    if message.payload_bytes != len(payload):
        raise ProtocolViolation(f"{message.payload_bytes} bytes declared, {len(payload)} sent")
    tensors: dict[TensorName, torch.Tensor] = {}
    offset = 0
    for spec in message.tensors:
        dtype = _DTYPES[spec.dtype]
        count = spec.nbytes // dtype.itemsize
        tensors[spec.name] = torch.frombuffer(payload, dtype=dtype, count=count, offset=offset).view(spec.shape)
        offset += -(-spec.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    return message, tensors


async def send(stream: Stream, message: Message, tensors: Tensors | None = None) -> None:
    """Send one message. Raises `StreamBroken`."""
    header, payload = encode(message, tensors or {})
    await stream.send(header, payload)


async def receive(stream: Stream) -> tuple[Message, dict[TensorName, torch.Tensor]]:
    """The next message. Raises `StreamBroken`, or `ProtocolViolation` for bytes that are none."""
    header, payload = await stream.receive()
    return decode(header, payload)
