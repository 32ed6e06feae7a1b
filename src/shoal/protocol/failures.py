"""What a server says when it does not do what was asked, and the error that the client raises for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from shoal.errors import CannotRewind, Misrouted, PeerError, RequestRejected, ServerBusy, ServerLost, ServerMoved
from shoal.protocol.limits import Reason
from shoal.protocol.message import Message

FailureCode = Literal["busy", "misrouted", "moved", "rejected", "rewind", "leaving", "broken"]

FAILURES: Mapping[FailureCode, tuple[type[PeerError], str]] = {
    "busy": (ServerBusy, "is busy"),
    "misrouted": (Misrouted, "cannot do this"),
    "moved": (ServerMoved, "cannot do this"),
    "rejected": (RequestRejected, "rejects this"),
    "rewind": (CannotRewind, "gave up"),
    "leaving": (ServerLost, "gave up"),
    "broken": (ServerLost, "gave up"),
}
"""Of each code: the error that the client raises for it, and what the message of that error says of the server."""


class Failure(Message):
    """Server: why it does not do what was asked. The server closes the stream after it.

    `busy`: there is no room now, come back in `retry_after` seconds. `misrouted`: this server cannot do it, because its
    model, weights or size are others. `moved`: because its blocks are others, or it is changing them. `rejected`: the
    request is wrong, here and on every other server. `rewind`: the session cannot go back to that position; open
    another one and send everything again. `leaving`: the server is going away. `broken`: the server failed while it
    computed this.
    """

    kind: Literal["failure"] = "failure"
    code: FailureCode
    reason: Reason
    retry_after: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None
