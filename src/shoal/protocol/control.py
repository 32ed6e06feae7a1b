"""The messages that say what state a peer is in: alive, leaving, or done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.limits import (
    Epoch,
    Position,
)
from shoal.protocol.message import Message


class Ping(Message):
    """Client: is the server alive? The request is still wanted. Answered by `Pong`, at any time."""

    kind: Literal["ping"] = "ping"


class Pong(Message):
    """Server: it is alive. It is `working` if it computes what was asked on this stream, or has it in a queue.

    A session computes the step of this `epoch` and `position`, or expects it next. `num_passes` grows with every pass
    that the server computes, for any client: a server that is working while its count stands still for long is stuck.
    `queue_length` and `cache_tokens_left` are as in an announcement, and of this moment.
    """

    kind: Literal["pong"] = "pong"
    working: bool = False
    num_passes: Annotated[int, Field(ge=0)] = 0
    epoch: Epoch = 0
    position: Position = 0
    queue_length: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None
    cache_tokens_left: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None


class Leaving(Message):
    """Server: it goes away in `seconds`. The client should continue on another server before that."""

    kind: Literal["leaving"] = "leaving"
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class Arrived(Message):
    """Server: a large step that was pushed has arrived, with this `goodput`. Nothing else is said to who pushes."""

    kind: Literal["arrived"] = "arrived"


class Close(Message):
    """Client: the end of the stream. It is a message because a crash and a clean close of a stream look alike."""

    kind: Literal["close"] = "close"
