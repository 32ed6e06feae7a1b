"""A frame: a header and a payload, each behind its length.

    u32 header length | u64 payload length | header | payload        (lengths big-endian)

Both transports measure frames by the same limits, before they reserve memory for them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from shoal.net.transport import Buffer
from shoal.protocol import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, ProtocolViolation

_LENGTHS = struct.Struct(">IQ")
PREFIX_BYTES = _LENGTHS.size


def payload_bytes(payload: Sequence[Buffer]) -> int:
    """How long the buffers are, put together."""
    return sum(memoryview(buffer).nbytes for buffer in payload)


def pack_prefix(header: int, payload: int) -> bytes:
    """The lengths of a frame, as they go over the wire.

    Raises `ProtocolViolation` for a frame that nobody would accept.
    """
    _check(header, payload)
    return _LENGTHS.pack(header, payload)


def unpack_prefix(prefix: bytes) -> tuple[int, int]:
    """The lengths of the header and of the payload that follow.

    Raises `ProtocolViolation` when they are beyond the limits.
    """
    header, payload = _LENGTHS.unpack(prefix)
    _check(header, payload)
    return header, payload


def _check(header: int, payload: int) -> None:
    if header > MAX_HEADER_BYTES:
        raise ProtocolViolation(f"a header of {header} bytes")
    if payload > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a payload of {payload} bytes")
