"""Every message that peers exchange, with its limits.

A stream carries frames; a frame is one message and the tensors that it declares (`docs/protocol.md` has the bytes).
The first message of a stream is `Open` for a session, `Forward` or `Backward` for single computations, or a `Step`
with a `link`, which one server pushes to the next; before the former three there may be `Adapter`s. Whatever arrives is
parsed here before anything else looks at it: an unknown kind, field or type, or a number beyond its limit, is refused.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from shoal.adapters import MAX_LAYERS, AdapterName, HostedName, Layers, Module
from shoal.strict import Strict
from shoal.tensors import Encoding, TensorName, TensorSpec

PROTOCOL = "/shoal/5"
"""The libp2p protocol id: peers that speak another version cannot open a stream at all."""

MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
MAX_STEP_TOKENS = 1024
"""The tokens, over all sequences of a batch, that one message carries at most; clients cut longer work in pieces.

A single token of every sequence always fits; for one sequence of a `Forward` or `Backward`, see `MAX_PASS_TOKENS`."""
MAX_PASS_TOKENS = 16 * 1024
"""The tokens of one sequence of a `Forward` or `Backward`: it cannot be cut, and some attention needs their square."""
MAX_LOGITS_BYTES = 64 * 1024 * 1024
"""The logits of one answer: a small question must not cost much memory. Beyond, clients compute the head themselves."""
MAX_BATCH = 1024
MAX_LENGTH = 1 << 22
MAX_BLOCKS = 4096
MAX_HOPS = 256
MAX_FACTORS = 200_000
"""Tensors of factors in a span: a bit for each fits into a header."""
MAX_TEXT = 256
MAX_STEPS_AHEAD = 16
"""The steps of one session that a server keeps beside the one that it computes."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]  # it ends up on terminals
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Position = Annotated[int, Field(ge=0, le=MAX_LENGTH)]
Epoch = Annotated[int, Field(ge=0, lt=1 << 53)]
PeerId = Annotated[str, Field(min_length=1, max_length=64)]
Address = Annotated[str, Field(max_length=300, pattern=r"^[^\p{C}]*$")]
Link = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A secret of the client and two servers: by it the one may push to the other's session."""
Adapted = Annotated[tuple[AdapterName | None, ...], Field(max_length=MAX_BLOCKS, strict=False)]
"""The adapter of each block of a span; nothing at all if no block has one."""
PassId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]


def _packed(indices: tuple[int, ...]) -> str:
    packed = bytearray(max(indices, default=-1) // 8 + 1)
    for index in indices:
        packed[index // 8] |= 1 << index % 8
    return packed.hex()


def _unpacked(indices: object) -> object:
    if isinstance(indices, tuple):  # ours: nothing that is parsed is a tuple
        return indices
    if not isinstance(indices, str) or len(indices) > MAX_FACTORS // 4:
        raise ValueError(f"not up to {MAX_FACTORS} bits in hexadecimal digits")
    packed = bytes.fromhex(indices)
    return tuple(index for index in range(8 * len(packed)) if packed[index // 8] >> index % 8 & 1)


FactorIndices = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_FACTORS)], ...], BeforeValidator(_unpacked), PlainSerializer(_packed)
]
"""Numbers of factors' tensors, which travel as bits: in hexadecimal digits, eight bits a byte, the lowest first."""


class ProtocolViolation(ValueError):
    """Bytes that are no message of ours. The stream that carried them is closed."""


class _Message(Strict):
    carries: ClassVar[tuple[TensorName, ...]] = ()
    tensors: Annotated[tuple[TensorSpec, ...], Field(max_length=4, strict=False)] = ()

    @model_validator(mode="after")
    def _tensors_belong_here(self) -> _Message:
        names = [spec.name for spec in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is declared twice")
        if strangers := [name for name in names if name not in self.carries]:
            raise ValueError(f"it carries no {strangers[0]}")
        return self

    def encoding_of(self, name: TensorName) -> Encoding:
        """How one of its tensors travels; "raw" for one that it lacks."""
        return next((spec.encoding for spec in self.tensors if spec.name == name), "raw")

    @property
    def payload_bytes(self) -> int:
        return sum(spec.aligned_nbytes for spec in self.tensors)


class Before(Strict):
    """The server from which a session's steps are pushed, and by which link."""

    peer: PeerId
    link: Link


class After(Strict):
    """The server to which a session's outputs are pushed, where it may be reached, and by which link."""

    peer: PeerId
    link: Link
    addresses: Annotated[tuple[Address, ...], Field(max_length=8, strict=False)] = ()


class _OnSpan(_Message):
    model: Text
    fingerprint: Text
    start: Block
    end: Block

    @model_validator(mode="after")
    def _span_is_not_empty(self) -> _OnSpan:
        if self.start >= self.end:
            raise ValueError("an empty span")
        return self


class _Computation(_OnSpan):
    """Something to be computed on a span with `adapters`, which the server must have been sent (`Adapter`)."""

    adapters: Adapted = ()

    @model_validator(mode="after")
    def _every_block_is_named(self) -> _Computation:
        if len(self.adapters) not in (0, self.end - self.start):
            raise ValueError("adapters for other blocks than the span's")
        return self


class Adapter(_Message):
    """Client: keep this adapter of a block for me, under the name that its contents have (`shoal.adapters`).

    Tensor: `factors` [N], those of all its layers, one after another. It is kept as long as the client has a stream to
    the server and there is room; the one that it `replaces` is not needed any more. If it is of an adapter that is
    `shared`, the server may keep it for others. Answered by `Learned`.
    """

    carries = ("factors",)
    kind: Literal["adapter"] = "adapter"
    block: Block
    layers: Layers
    replaces: AdapterName | None = None
    shared: HostedName | None = None


class Learned(_Message):
    """Server: the adapter is here."""

    kind: Literal["learned"] = "learned"


class Norms(_OnSpan):
    """Client: how long the rows of these linear layers' weights are, in the one block of this span.

    With these DoRA's magnitudes begin, where training is offered. No layer is named twice. Answered by a `Result` with
    `factors` [N], float32, layer after layer.
    """

    kind: Literal["norms"] = "norms"
    modules: Annotated[tuple[Module, ...], Field(min_length=1, max_length=MAX_LAYERS, strict=False)]

    @model_validator(mode="after")
    def _of_one_block_and_once_each(self) -> Norms:
        if self.end - self.start != 1:
            raise ValueError("norms of several blocks")
        if len(set(self.modules)) != len(self.modules):
            raise ValueError("norms of one layer twice")
        return self


class Open(_Computation):
    """Client: begin a session on these blocks, which is expected to get `max_length` tokens of `batch_size` sequences.

    It may get longer, as far as the model and the server's cache allow. `digests` [B, N, 16] uint8 (optional) name
    the first N pages of every sequence's inputs (`shoal.model.prefix`), which need not be sent if the server has
    computed the same. `salt` is the tenant's: only sessions of equal salts share what was computed. `encoding` is
    how the outputs of these pages shall travel; those of the first `skip` tokens are not wanted. The session is in
    the ring between `before` and `after`, and its first epoch is `epoch`.
    """

    carries = ("digests",)
    kind: Literal["open"] = "open"
    salt: Text = ""
    encoding: Encoding = "raw"
    skip: Position = 0
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    max_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    epoch: Epoch = 0
    before: Before | None = None
    after: After | None = None


class Opened(_Message):
    """Server: send a step. The session holds `num_tokens` tokens already; `hidden` [B, T, D] are the wanted outputs."""

    carries = ("hidden",)
    kind: Literal["opened"] = "opened"
    num_tokens: Position = 0


class Tie(_Message):
    """Client: the session's place in the ring is now between these two servers."""

    kind: Literal["tie"] = "tie"
    before: Before | None = None
    after: After | None = None


class Rewind(_Message):
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


class Step(_Message):
    """Client, or the server before: append tokens to the session and compute them.

    Tensors: `hidden` [B, T, D]; optionally `positions` [B, T] int64 and the padding `mask` [B, T] uint8 of the new
    tokens. A step is known by its epoch and position: sent twice, it is computed once; one that comes too early waits
    for those before it. The outputs of its first `skip` tokens are not wanted back.

    If it goes `onward`, the outputs are also pushed to the session's next server, as a step which goes onward once
    less. A step that is pushed names the `link` by which its receiver knows whose it is.

    With `logits`, the last server of the ring answers with what its output head says instead of hidden states: for so
    many of the last positions, and of the `top_k` likeliest tokens only if that is given.
    """

    carries = ("hidden", "positions", "mask")
    kind: Literal["step"] = "step"
    epoch: Epoch = 0
    position: Position
    skip: Position = 0
    onward: Annotated[int, Field(ge=0, le=MAX_HOPS)] = 0
    link: Link | None = None
    logits: Annotated[int, Field(ge=0, le=MAX_STEP_TOKENS)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_LENGTH)] | None = None

    @model_validator(mode="after")
    def _top_k_is_of_logits(self) -> Step:
        if self.top_k is not None and self.logits is None:
            raise ValueError("the likeliest tokens without logits")
        return self


class Forward(_Computation):
    """Client: compute the span without a cache. Tensors: `hidden` [B, T, D]; optionally `positions`, `mask` [B, T].

    With `keep`, a `Backward` of that id is going to follow: what it needs may be kept. The layers of the adapters that
    have a dropout drop what the `seed` says; without one, nothing.
    """

    carries = ("hidden", "positions", "mask")
    kind: Literal["forward"] = "forward"
    keep: PassId | None = None
    seed: Seed | None = None


class Backward(_Computation):
    """Client: the gradient of the span's factors and, unless that is not wanted, of its `inputs`.

    The factors of `frozen` blocks need none. Tensors: `grad` [B, T, D] of the output; and those of the `Forward`,
    unless the server has `kept` what it needs.
    """

    carries = ("hidden", "positions", "mask", "grad")
    kind: Literal["backward"] = "backward"
    kept: PassId | None = None
    seed: Seed | None = None
    inputs: bool = True
    frozen: Annotated[tuple[Block, ...], Field(max_length=MAX_BLOCKS, strict=False)] = ()

    @model_validator(mode="after")
    def _frozen_blocks_are_here(self) -> Backward:
        if any(not self.start <= block < self.end for block in self.frozen):
            raise ValueError("frozen blocks outside of the span")
        return self


class Lacking(_Message):
    """Server: what was asked needs these `adapters`, or what was to be `kept`, and they are not here (any more).

    Send them, and ask again.
    """

    kind: Literal["lacking"] = "lacking"
    adapters: Annotated[tuple[AdapterName, ...], Field(max_length=MAX_BLOCKS, strict=False)] = ()
    kept: bool = False


class Result(_Message):
    """Server: the answer to `Step`, `Forward` (`hidden`), `Norms` (`factors`) or `Backward`.

    That has `grad`, if it is wanted, and `factor_grads`; of the factors' tensors, counted over all blocks, those
    `unused` had no part in the computation, and have no gradient.

    `factor_grads` [N] are the gradients of the factors of the span's adapters, block after block, in their dtype. Its
    dtype and its encoding are those of the question's `hidden`. To a step it has the step's `epoch` and `position`,
    the `seconds` that it took on the server, waiting for others included, and the outputs of the tokens that are not
    skipped, or nothing if all are.

    To a `Step` that wants logits of N positions (`logits` in it) it has `logits` [B, N, V] instead, always raw, or
    `logits` and `ids` [B, N, top_k] int64; for N = 0, nothing.
    """

    carries = ("hidden", "grad", "logits", "ids", "factor_grads", "factors")
    kind: Literal["result"] = "result"
    epoch: Epoch = 0
    position: Position = 0
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] | None = None
    unused: FactorIndices = ()


class Unreached(_Message):
    """Server: the outputs of this step could not be pushed to the next server. Carry them there yourself."""

    kind: Literal["unreached"] = "unreached"
    epoch: Epoch
    position: Position


class Ping(_Message):
    """Client: are you there, and is this still wanted? Answered by `Pong`, at any time."""

    kind: Literal["ping"] = "ping"


class Pong(_Message):
    """Server: here. `working` on what was asked here, or waiting for its turn; all that it computes, it counts.

    A session expects the step of this `epoch` and `position` next, or computes it. `num_passes` grows with every pass
    of the whole server: a server that works, and whose count stands still for long, is stuck.
    """

    kind: Literal["pong"] = "pong"
    working: bool = False
    num_passes: Annotated[int, Field(ge=0)] = 0
    epoch: Epoch = 0
    position: Position = 0


class Leaving(_Message):
    """Server: it goes away in so many `seconds`. Continue elsewhere before."""

    kind: Literal["leaving"] = "leaving"
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class Failure(_Message):
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


class Close(_Message):
    """Client: the end, in band, because a crash and a clean close of a stream look alike."""

    kind: Literal["close"] = "close"


Message = (
    Open
    | Opened
    | Tie
    | Rewind
    | Step
    | Adapter
    | Learned
    | Norms
    | Forward
    | Backward
    | Lacking
    | Result
    | Unreached
    | Ping
    | Pong
    | Leaving
    | Failure
    | Close
)

QUESTIONS = frozenset({"open", "tie", "rewind", "step", "adapter", "norms", "forward", "backward", "ping", "close"})
"""The kinds of messages that a server hears, from clients and from the servers before it."""
IN_SESSION = frozenset({"step", "rewind", "tie", "ping", "close"})
"""Those of them that may follow `Open`."""
ANSWERS = frozenset({"opened", "learned", "lacking", "result", "unreached", "pong", "leaving", "failure"})
"""The kinds that a server says."""

_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def parse(header: bytes | bytearray) -> Message:
    """The message that these bytes are.

    Raises `ProtocolViolation` for anything else, in one line and without echoing what was sent.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolViolation(f"a header of {len(header)} bytes")
    try:
        message = _MESSAGES.validate_json(header)
    except ValidationError as invalid:
        error = invalid.errors(include_input=False, include_url=False)[0]
        raise ProtocolViolation(f"not a valid message: {_described(error)}") from None
    if message.payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a payload of {message.payload_bytes} bytes")
    decoded_bytes = sum(spec.decoded_nbytes for spec in message.tensors)
    if decoded_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"tensors of {decoded_bytes} bytes")
    return message


def _described(error: ErrorDetails) -> str:
    """Where and why, without the words of who sent it: names of fields, tags of kinds."""
    match error["type"]:
        case "extra_forbidden":
            where, why = error["loc"][:-1], "a field that it does not have"
        case "union_tag_invalid":
            where, why = error["loc"], "an unknown kind"
        case _:
            where, why = error["loc"], error["msg"][:200]
    return ": ".join((*(str(part) for part in where), why))


def dump(message: Message) -> bytes:
    """The header bytes of a message."""
    return message.model_dump_json(exclude_none=True).encode()
