"""The messages of single passes without a cache: forward, backward, and the norms with which DoRA begins."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from shoal.adapters import MAX_LAYERS, Module
from shoal.protocol.limits import (
    MAX_BLOCKS,
    MAX_FACTORS,
    Block,
    PassId,
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


class PassResult(Message):
    """Server: the answer to a `Forward` or a `Backward`.

    To a `Forward` it has `hidden` [B, T, D], the outputs of the span. To a `Backward` it has `grad` [B, T, D], the
    gradient of the inputs, if that was wanted, and `factor_grads` [F], the gradients of the factors of the span's
    adapters, block after block, in the dtype of the factors. The other tensors have the dtype and the encoding of the
    request's `hidden` or `grad`. `unused` are the numbers, counted over all blocks, of the factors' tensors that had no
    part in the computation: they have no gradient.
    """

    carries = ("hidden", "grad", "factor_grads")
    kind: Literal["pass_result"] = "pass_result"
    unused: FactorIndices = ()


class NormsResult(Message):
    """Server: the answer to `Norms`. Tensor: `factors` [F], float32, the norms of one layer's rows after another's."""

    carries = ("factors",)
    kind: Literal["norms_result"] = "norms_result"
