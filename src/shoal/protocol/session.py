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
    Digest,
    Epoch,
    Link,
    PeerId,
    Position,
    Signature,
    Text,
)
from shoal.protocol.message import ComputationMessage, Message
from shoal.strict import Strict
from shoal.tensors import Encoding


class Upstream(Strict):
    """The server that pushes steps to a session, and the link over which it does."""

    peer: PeerId
    link: Link


class Downstream(Strict):
    """The server to which a session's outputs are pushed, its addresses, and the link over which they are pushed.

    `packs` says that it unpacks tensors.
    """

    peer: PeerId
    link: Link
    addresses: Annotated[tuple[Address, ...], Field(max_length=8, strict=False)] = ()
    packs: Literal[True] | None = None


class Open(ComputationMessage):
    """Client: begin a session of `batch_size` sequences on these blocks.

    The client expects each sequence to get `expected_length` tokens. It may get longer, as far as the model and the
    server's cache allow. Tensor: `digests` [B, N, 16] uint8 (optional), the names of the first N pages of every
    sequence's inputs (`shoal.prefix`). The client need not send inputs of pages that the server has computed before;
    only sessions of equal `salt` share them. `encoding` is how the outputs of these pages travel, without those of the
    first `skip` tokens. The session's place in the ring is between `upstream` and `downstream`, and its first epoch is
    `epoch`. With a name in `receipts`, drawn for this session alone, the server signs what it computes (`Receipt`).
    Answered by `Opened` or `NotCached`.
    """

    carries = ("digests",)
    kind: Literal["open"] = "open"
    salt: Text = ""
    encoding: Encoding = "raw"
    skip: Position = 0
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    expected_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    epoch: Epoch = 0
    receipts: Link | None = None
    upstream: Upstream | None = None
    downstream: Downstream | None = None


class Opened(Message):
    """Server: the session is open, and holds `num_tokens` tokens already.

    Tensor: `hidden` [B, T, D], the outputs of these tokens, but for those that the client skips.
    """

    carries = ("hidden",)
    kind: Literal["opened"] = "opened"
    num_tokens: Position = 0


class SetNeighbors(Message):
    """Client: the session's place in the ring is now between these two servers."""

    kind: Literal["set_neighbors"] = "set_neighbors"
    upstream: Upstream | None = None
    downstream: Downstream | None = None


class Rewind(Message):
    """Client: the next step begins at `position`, and belongs to this `epoch`, which is later than all before.

    First, `rows` (if given) says which old sequence each sequence continues, as beam search and batch changes need.
    Then the session forgets what it holds beyond `position`. It ignores steps of former epochs from now on.
    """

    kind: Literal["rewind"] = "rewind"
    epoch: Epoch
    position: Position
    rows: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=MAX_BATCH)], ...] | None,
        Field(min_length=1, max_length=MAX_BATCH, strict=False),
    ] = None


class Step(Message):
    """Client or upstream server: append tokens to the session and compute them. Answered by `StepResult`.

    Tensors: `hidden` [B, T, D]; optionally `positions` [B, T] int64 and the padding `mask` [B, T] uint8 of the new
    tokens. `epoch` and `position` identify a step: sent twice, it is computed once; sent too early, it waits for the
    steps before it. The outputs of its first `skip` tokens are not sent back.

    With `hops_left`, the server also pushes the outputs to the downstream server, as a step with one hop less.
    A pushed step names the `link` that tells the receiver which session it belongs to.

    With `logits`, the last server of the ring answers with the output head's logits of that many last positions instead
    of hidden states; with `top_k`, only those of the likeliest tokens.
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
    """Server: the outputs of this step could not be pushed to the downstream server. The client has to send them."""

    kind: Literal["unreached"] = "unreached"
    epoch: Epoch
    position: Position


class Receipt(Message):
    """Server: its signature for the tokens of a session from `first` to `end`, as it had them in this `epoch`.

    `inputs` is the digest of what it received, `answered` of the outputs that it sent to the client, and `pushed` of
    those that it pushed to the downstream server; None for outputs that it did not send. `shoal.net.signing` says of
    which bytes the digests and the signature are.
    """

    kind: Literal["receipt"] = "receipt"
    epoch: Epoch
    first: Position
    end: Position
    inputs: Digest
    answered: Digest | None = None
    pushed: Digest | None = None
    signature: Signature

    @model_validator(mode="after")
    def _covers_tokens(self) -> Receipt:
        if self.first >= self.end:
            raise ValueError("a receipt for no tokens")
        return self
