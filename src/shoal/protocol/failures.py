"""What a server says when it does not do what was asked, and what the client makes of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.limits import (
    Reason,
)
from shoal.protocol.message import Message


class Failure(Message):
    """Server: why it does not do what was asked.

    `busy`: no room now, come back in `retry_after` seconds; `misrouted`: not on this server, whose blocks, weights or
    size are others; `rejected`: the request is wrong and will be everywhere; `rewind`: the session cannot go back to
    that position, send everything anew; `leaving`: the server is going away; `broken`: it failed in computing this.
    The server closes the stream after it.
    """

    kind: Literal["failure"] = "failure"
    code: Literal["busy", "misrouted", "rejected", "rewind", "leaving", "broken"]
    reason: Reason
    retry_after: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None
