"""The messages by which a client's adapters reach a server, or turn out not to be there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.adapters import AdapterName, HostedName, Layers
from shoal.protocol.limits import (
    MAX_BLOCKS,
    Block,
)
from shoal.protocol.message import Message


class Adapter(Message):
    """Client: keep this adapter of a block for me, under the name that its contents have (`shoal.adapters`).

    Tensor: `factors` [N], those of all its layers, one after another. It is kept as long as the client has a stream to
    the server and there is room; the one that it `replaces` is not needed any more. If it is of an adapter that is
    `shared`, the server may keep it for others. Answered by `AdapterStored`.
    """

    carries = ("factors",)
    kind: Literal["adapter"] = "adapter"
    block: Block
    layers: Layers
    replaces: AdapterName | None = None
    shared: HostedName | None = None


class AdapterStored(Message):
    """Server: the adapter is here."""

    kind: Literal["adapter_stored"] = "adapter_stored"


class NotCached(Message):
    """Server: what was asked needs these `adapters`, or what was to be `kept`, and they are not here (any more).

    Send them, and ask again.
    """

    kind: Literal["not_cached"] = "not_cached"
    adapters: Annotated[tuple[AdapterName, ...], Field(max_length=MAX_BLOCKS, strict=False)] = ()
    kept: bool = False
