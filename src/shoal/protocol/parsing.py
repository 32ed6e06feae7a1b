"""From the bytes of a header to a message, and back."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from shoal.protocol.acknowledging import Acknowledge, Introduce
from shoal.protocol.adapters import Adapter, AdapterStored, NotCached
from shoal.protocol.control import Arrived, Close, Leaving, Ping, Pong
from shoal.protocol.dialing import DialBack, DialedBack
from shoal.protocol.failures import Failure
from shoal.protocol.limits import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from shoal.protocol.passes import Backward, Forward, Norms, NormsResult, PassInputs, PassResult, SumResult, TakeSum
from shoal.protocol.session import Open, Opened, Receipt, Rewind, SetNeighbors, Step, StepResult, Unreached
from shoal.protocol.transfers import Filler, Transfer
from shoal.protocol.weights import Content, GetHeld, GetInvitation, GetManifest, GetPiece, InvitationText


class ProtocolViolation(ValueError):
    """Bytes that are not a message of this protocol. The stream that carried them is closed."""


AnyMessage = (
    Introduce
    | Acknowledge
    | Open
    | Opened
    | SetNeighbors
    | Rewind
    | Step
    | StepResult
    | Unreached
    | Receipt
    | Adapter
    | AdapterStored
    | NotCached
    | Norms
    | NormsResult
    | Forward
    | Backward
    | PassInputs
    | PassResult
    | TakeSum
    | SumResult
    | Transfer
    | Filler
    | GetInvitation
    | InvitationText
    | GetManifest
    | GetHeld
    | GetPiece
    | Content
    | DialBack
    | DialedBack
    | Ping
    | Pong
    | Leaving
    | Arrived
    | Failure
    | Close
)

REQUEST_KINDS = frozenset(
    {
        "introduce",
        "acknowledge",
        "open",
        "set_neighbors",
        "rewind",
        "step",
        "adapter",
        "norms",
        "forward",
        "backward",
        "pass_inputs",
        "take_sum",
        "transfer",
        "get_invitation",
        "get_manifest",
        "get_held",
        "get_piece",
        "ping",
        "close",
    }
)
"""The kinds of messages that a server receives, from clients and from upstream servers."""

SESSION_KINDS = frozenset({"step", "rewind", "set_neighbors", "acknowledge", "ping", "close"})
"""The request kinds that may follow `Open`."""

TRANSFER_KINDS = frozenset({"filler", "failure"})
"""The kinds of messages that follow `Transfer`, in either direction. Elsewhere a `Filler` is refused unread."""

JOINING_KINDS = frozenset({"invitation", "content", "failure"})
"""The kinds of messages that answer machines that join."""

REPLY_KINDS = frozenset(
    {
        "opened",
        "step_result",
        "unreached",
        "receipt",
        "adapter_stored",
        "not_cached",
        "pass_result",
        "sum_result",
        "norms_result",
        "pong",
        "leaving",
        "failure",
    }
)
"""The kinds of messages that a server sends to clients."""

_MESSAGES: TypeAdapter[AnyMessage] = TypeAdapter(Annotated[AnyMessage, Field(discriminator="kind")])


def parse(header: bytes | bytearray) -> AnyMessage:
    """The message that a header contains.

    Raises `ProtocolViolation` for any other bytes, in one line that repeats nothing of what was sent.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolViolation(f"a header of {len(header)} bytes")
    try:
        message = _MESSAGES.validate_json(header)
    except ValidationError as invalid:
        error = invalid.errors(include_input=False, include_url=False)[0]
        raise ProtocolViolation(f"not a valid message: {_described(error)}") from None
    if message.payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a payload of {message.payload_bytes} bytes")
    decoded_bytes = sum(spec.decoded_nbytes for spec in message.tensors)
    if decoded_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"tensors of {decoded_bytes} bytes")
    return message


def _described(error: ErrorDetails) -> str:
    """Where and why a header is invalid, without the words of its sender: names of fields, tags of kinds."""
    match error["type"]:
        case "extra_forbidden":
            where, why = error["loc"][:-1], "a field that it does not have"
        case "union_tag_invalid":
            where, why = error["loc"], "an unknown kind"
        case _:
            where, why = error["loc"], error["msg"][:200]
    return ": ".join((*(str(part) for part in where), why))


def dump(message: AnyMessage) -> bytes:
    """The header bytes of a message."""
    return message.model_dump_json(exclude_none=True).encode()
