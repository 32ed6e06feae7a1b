"""A frame on the wire: the lengths of its header and its payload, the header, the payload.

    u32 header length | u64 payload length | header | payload        (lengths big-endian)

Both transports check the lengths against the same limits before they reserve memory for a frame.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from shoal.net.transport import Buffer
from shoal.protocol import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, ProtocolViolation

_LENGTHS = struct.Struct(">IQ")
PREFIX_BYTES = _LENGTHS.size
"""The two lengths in front of every frame."""


def payload_bytes(payload: Sequence[Buffer]) -> int:
    """The bytes of all buffers together."""
    return sum(memoryview(buffer).nbytes for buffer in payload)


def pack_prefix(header: int, payload: int) -> bytes:
    """The prefix of a frame whose header and payload have these lengths in bytes.

    Raises `ProtocolViolation` for a length beyond the limits.
    """
    _check(header, payload)
    return _LENGTHS.pack(header, payload)


def unpack_prefix(prefix: bytes) -> tuple[int, int]:
    """The lengths of the header and of the payload in bytes.

    Raises `ProtocolViolation` for a length beyond the limits.
    """
    header, payload = _LENGTHS.unpack(prefix)
    _check(header, payload)
    return header, payload


def _check(header: int, payload: int) -> None:
    if header > MAX_HEADER_BYTES:
        raise ProtocolViolation(f"a header of {header} bytes")
    if payload > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a payload of {payload} bytes")
