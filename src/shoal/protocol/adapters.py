"""The messages by which a client's adapters reach a server, or by which the server says that it lacks them."""

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
    """Client: keep this adapter of a block, under the name that follows from its contents (`shoal.adapters`).

    Tensor: `factors` [F], those of all layers, one layer after another. The server keeps the adapter as long as the
    client has a stream to it and there is room. The one that it `replaces` is not needed any more. An adapter of a PEFT
    folder that several clients use is `shared`: the server may keep it for others. Answered by `AdapterStored`.
    """

    carries = ("factors",)
    kind: Literal["adapter"] = "adapter"
    block: Block
    layers: Layers
    replaces: AdapterName | None = None
    shared: HostedName | None = None


class AdapterStored(Message):
    """Server: the adapter is stored."""

    kind: Literal["adapter_stored"] = "adapter_stored"


class NotCached(Message):
    """Server: the request needs these `adapters`, or the pass that was to be `kept`, and the server does not have them.

    The client sends the adapters, or the inputs of the pass, and asks again. So it does if the `inputs` that another
    server has pushed cannot be used.
    """

    kind: Literal["not_cached"] = "not_cached"
    adapters: Annotated[tuple[AdapterName, ...], Field(max_length=MAX_BLOCKS, strict=False)] = ()
    kept: bool = False
    inputs: bool = False
