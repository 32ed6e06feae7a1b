"""The messages by which a peer learns whether others can dial it. They have a libp2p protocol id of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.limits import Address
from shoal.protocol.message import Message

REACH_PROTOCOL = "/shoal/reach/1"
"""The libp2p protocol id of these streams. Every peer that listens answers them, also one without blocks."""
MAX_DIALED_ADDRESSES = 8


class DialBack(Message):
    """A peer: can I be dialled at these addresses, from a port of yours that I know nothing of?

    Answered by `DialedBack`, or by a `Failure` of a peer that is asked too often.
    """

    kind: Literal["dial_back"] = "dial_back"
    addresses: Annotated[tuple[Address, ...], Field(min_length=1, max_length=MAX_DIALED_ADDRESSES, strict=False)]


class DialedBack(Message):
    """At which of the addresses the peer came through, in their order, and proved its id.

    `seen_at` is the address at which it is seen. `clock` is the Unix time. A peer that `relays` carries the streams of
    others that cannot be dialled.
    """

    kind: Literal["dialed_back"] = "dialed_back"
    reached: Annotated[tuple[bool, ...], Field(min_length=1, max_length=MAX_DIALED_ADDRESSES, strict=False)]
    seen_at: Address | None = None
    clock: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    relays: bool = False
