"""The messages of a session: how it is opened, steps through it, and moves between servers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.protocol.limits import (
    MAX_BATCH,
    MAX_HOPS,
    MAX_LENGTH,
    MAX_STEP_TOKENS,
    Address,
    Epoch,
    Link,
    PeerId,
    Position,
    Text,
)
from shoal.protocol.message import ComputationMessage, Message
from shoal.strict import Strict
from shoal.tensors import Encoding


class Upstream(Strict):
    """The server from which a session's steps are pushed, and by which link."""

    peer: PeerId
    link: Link


class Downstream(Strict):
    """The server to which a session's outputs are pushed, where it may be reached, and by which link."""

    peer: PeerId
    link: Link
    addresses: Annotated[tuple[Address, ...], Field(max_length=8, strict=False)] = ()


class Open(ComputationMessage):
    """Client: begin a session of `batch_size` sequences on these blocks.

    The client expects each sequence to get `expected_length` tokens. It may get longer, as far as the model and the
    server's cache allow. `digests` [B, N, 16] uint8 (optional) name
    the first N pages of every sequence's inputs (`shoal.prefix`), which need not be sent if the server has
    computed the same. `salt` is the tenant's: only sessions of equal salts share what was computed. `encoding` is
    how the outputs of these pages shall travel; those of the first `skip` tokens are not wanted. The session is in
    the ring between `upstream` and `downstream`, and its first epoch is `epoch`.
    """

    carries = ("digests",)
    kind: Literal["open"] = "open"
    salt: Text = ""
    encoding: Encoding = "raw"
    skip: Position = 0
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    expected_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    epoch: Epoch = 0
    upstream: Upstream | None = None
    downstream: Downstream | None = None


class Opened(Message):
    """Server: send a step. The session holds `num_tokens` tokens already; `hidden` [B, T, D] are the wanted outputs."""

    carries = ("hidden",)
    kind: Literal["opened"] = "opened"
    num_tokens: Position = 0


class SetNeighbors(Message):
    """Client: the session's place in the ring is now between these two servers."""

    kind: Literal["set_neighbors"] = "set_neighbors"
    upstream: Upstream | None = None
    downstream: Downstream | None = None


class Rewind(Message):
    """Client: the next step begins at `position`, and is of this `epoch`, which is later than all before.

    First, `rows` (if given) says which old sequence each sequence continues, as beam search and batch changes need;
    then whatever the session holds beyond `position` is forgotten. Steps of former epochs that are still on their way
    mean nothing any more.
    """

    kind: Literal["rewind"] = "rewind"
    epoch: Epoch
    position: Position
    rows: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=MAX_BATCH)], ...] | None,
        Field(min_length=1, max_length=MAX_BATCH, strict=False),
    ] = None


class Step(Message):
    """Client, or the server before: append tokens to the session and compute them.

    Tensors: `hidden` [B, T, D]; optionally `positions` [B, T] int64 and the padding `mask` [B, T] uint8 of the new
    tokens. A step is known by its epoch and position: sent twice, it is computed once; one that comes too early waits
    for those before it. The outputs of its first `skip` tokens are not wanted back.

    If it goes `hops_left`, the outputs are also pushed to the session's next server, as a step which goes onward once
    less. A step that is pushed names the `link` by which its receiver knows whose it is.

    With `logits`, the last server of the ring answers with what its output head says instead of hidden states: for so
    many of the last positions, and of the `top_k` likeliest tokens only if that is given.
    """

    carries = ("hidden", "positions", "mask")
    kind: Literal["step"] = "step"
    epoch: Epoch = 0
    position: Position
    skip: Position = 0
    hops_left: Annotated[int, Field(ge=0, le=MAX_HOPS)] = 0
    link: Link | None = None
    logits: Annotated[int, Field(ge=0, le=MAX_STEP_TOKENS)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_LENGTH)] | None = None

    @model_validator(mode="after")
    def _top_k_is_of_logits(self) -> Step:
        if self.top_k is not None and self.logits is None:
            raise ValueError("the likeliest tokens without logits")
        return self


class StepResult(Message):
    """Server: the answer to the `Step` of the same `epoch` and `position`.

    Tensors: `hidden` [B, T, D], the outputs of the tokens that are not skipped, in the dtype and the encoding of the
    step's `hidden`; nothing if all are skipped. A step that asks for the logits of N tokens is answered with `logits`
    [B, N, V], or with `logits` and `ids` [B, N, top_k] int64, always raw; with nothing if N is 0. `seconds` is how long
    the step took on the server, waiting for other sessions included.
    """

    carries = ("hidden", "logits", "ids")
    kind: Literal["step_result"] = "step_result"
    epoch: Epoch = 0
    position: Position = 0
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] | None = None


class Unreached(Message):
    """Server: the outputs of this step could not be pushed to the next server. Carry them there yourself."""

    kind: Literal["unreached"] = "unreached"
    epoch: Epoch
    position: Position
