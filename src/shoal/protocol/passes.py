"""The messages of single passes without a cache: forward, backward, and the norms with which DoRA begins."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from shoal.adapters import MAX_LAYERS, Module
from shoal.protocol.limits import (
    MAX_BLOCKS,
    MAX_FACTORS,
    Block,
    Epoch,
    PassId,
    Position,
    Seed,
)
from shoal.protocol.message import ComputationMessage, Message, SpanMessage


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


class Norms(SpanMessage):
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


class Forward(ComputationMessage):
    """Client: compute the span without a cache. Tensors: `hidden` [B, T, D]; optionally `positions`, `mask` [B, T].

    With `keep`, a `Backward` of that id is going to follow: what it needs may be kept. The layers of the adapters that
    have a dropout drop what the `seed` says; without one, nothing.
    """

    carries = ("hidden", "positions", "mask")
    kind: Literal["forward"] = "forward"
    keep: PassId | None = None
    seed: Seed | None = None


class Backward(ComputationMessage):
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


class Result(Message):
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
