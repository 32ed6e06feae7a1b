"""The messages by which a client acknowledges what servers have computed for it, and says which servers it acts for.

What is signed, and how, is in `shoal.ledgers.statements`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.limits import PeerId
from shoal.protocol.message import Message
from shoal.strict import Strict

MAX_DELEGATIONS = 4
"""The servers that a client may act for: those of one machine, or of a few."""
MAX_PRESENTED = 16
"""The acknowledgements of others that a client may present. Checking one takes about a tenth of a millisecond."""
MAX_WORK = 1 << 53
"""The work of one acknowledgement, in millions of parameter-tokens: a month of thousands of the fastest GPUs."""
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Delegation(Strict):
    """The server `by` says that the client at the other end of this stream acts for it, until a Unix time."""

    by: PeerId
    until: Annotated[int, Field(ge=0, lt=1 << 40)]
    signature: Signature


class Acknowledgement(Strict):
    """`client` says what `server` has computed for it in a week: `work`, in millions of parameter-tokens.

    The `period` is the number of the week since the beginning of Unix time. `work` is the sum of that week so far.
    """

    client: PeerId
    server: PeerId
    period: Annotated[int, Field(ge=0, lt=1 << 20)]
    work: Annotated[int, Field(ge=1, lt=MAX_WORK)]
    signature: Signature


class Introduce(Message):
    """Client: it acts for these servers, which have computed for others what is acknowledged. Not answered.

    It comes at the beginning of a stream, once.
    """

    kind: Literal["introduce"] = "introduce"
    delegations: Annotated[tuple[Delegation, ...], Field(min_length=1, max_length=MAX_DELEGATIONS, strict=False)]
    acknowledgements: Annotated[tuple[Acknowledgement, ...], Field(max_length=MAX_PRESENTED, strict=False)] = ()


class Acknowledge(Message):
    """Client: what this server has computed for it so far. Not answered."""

    kind: Literal["acknowledge"] = "acknowledge"
    acknowledgement: Acknowledgement
