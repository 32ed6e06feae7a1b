"""Reserves places at relays, by libp2p's protocol "circuit relay v2".

The libp2p daemon could do that itself, for relays that are named when it starts. But it waits for minutes if there are
fewer than four, says nothing about their limits, and asks a relay that was restarted again after an hour. A place that
is reserved over a stream is as good: the relay knows the peer, and the daemon accepts what the relay brings.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from shoal.net.libp2p.daemon import Daemon, DaemonFailed, DaemonGone

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
REQUEST_SECONDS = 8.0
MAX_ANSWER_BYTES = 4096
_RESERVE, _STATUS = 0, 2
_OK = 100
_REASONS = {
    200: "it refuses",
    201: "it has no place left",
    202: "it does not relay for this peer",
    400: "it does not understand the request",
    401: "it does not understand the request",
}


class NotReserved(Exception):
    """The relay gave no place; the text says why."""


async def reserve(daemon: Daemon, relay: str, addresses: Sequence[str]) -> int | None:
    """Reserve a place for the daemon's peer at the peer `relay`, or renew it.

    Returns how many bytes the relay carries of one connection; `None` is any number. The place stays for an hour, if
    the connection to the relay does. Raises `NotReserved`, and `DaemonGone`, which says nothing of the relay.
    """
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            await daemon.connect(relay, addresses)
            _, reader, writer = await daemon.open(relay, HOP_PROTOCOL)
            try:
                writer.write(_framed(_Hop(type=_RESERVE).SerializeToString()))
                await writer.drain()
                answer = _Hop.FromString(await _read_frame(reader))
            finally:
                writer.close()
    except DaemonGone:
        raise
    except TimeoutError:
        raise NotReserved("it does not answer") from None
    except (DaemonFailed, ConnectionError, EOFError) as failure:
        raise NotReserved(f"it cannot be reached: {failure}") from None
    except (DecodeError, ValueError):
        raise NotReserved("its answer makes no sense") from None
    if answer.type != _STATUS or answer.status != _OK:
        raise NotReserved(_REASONS.get(answer.status, "it refuses"))
    return int(answer.limit.data) or None


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    """A message behind its length. Raises `EOFError`, and `ValueError` for one that is too long."""
    size = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
        if shift > 14:
            raise ValueError("a length of more than three bytes")
    if size > MAX_ANSWER_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return await reader.readexactly(size)


def _framed(message: bytes) -> bytes:
    assert len(message) < 128
    return bytes([len(message)]) + message


def _hop_message() -> Any:
    """The message of the protocol, without the fields that are not used here: those of the peer and the voucher."""
    field = descriptor_pb2.FieldDescriptorProto
    limit = descriptor_pb2.DescriptorProto(name="Limit")
    limit.field.add(name="duration", number=1, type=field.TYPE_UINT32, label=field.LABEL_OPTIONAL)
    limit.field.add(name="data", number=2, type=field.TYPE_UINT64, label=field.LABEL_OPTIONAL)
    hop = descriptor_pb2.DescriptorProto(name="Hop", nested_type=[limit])
    hop.field.add(name="type", number=1, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    hop.field.add(
        name="limit",
        number=4,
        type=field.TYPE_MESSAGE,
        type_name=".shoal.circuit.Hop.Limit",
        label=field.LABEL_OPTIONAL,
    )
    hop.field.add(name="status", number=5, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    file = descriptor_pb2.FileDescriptorProto(
        name="shoal/circuit.proto", package="shoal.circuit", syntax="proto2", message_type=[hop]
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shoal.circuit.Hop"))


_Hop = _hop_message()
