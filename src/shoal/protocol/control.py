"""The messages that say how a peer is: there, leaving, or done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.limits import (
    Epoch,
    Position,
)
from shoal.protocol.message import Message


class Ping(Message):
    """Client: are you there, and is this still wanted? Answered by `Pong`, at any time."""

    kind: Literal["ping"] = "ping"


class Pong(Message):
    """Server: here. `working` on what was asked here, or waiting for its turn; all that it computes, it counts.

    A session expects the step of this `epoch` and `position` next, or computes it. `num_passes` grows with every pass
    of the whole server: a server that works, and whose count stands still for long, is stuck.
    """

    kind: Literal["pong"] = "pong"
    working: bool = False
    num_passes: Annotated[int, Field(ge=0)] = 0
    epoch: Epoch = 0
    position: Position = 0


class Leaving(Message):
    """Server: it goes away in so many `seconds`. Continue elsewhere before."""

    kind: Literal["leaving"] = "leaving"
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class Close(Message):
    """Client: the end, in band, because a crash and a clean close of a stream look alike."""

    kind: Literal["close"] = "close"
