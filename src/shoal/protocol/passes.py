"""The messages of single passes without a cache: forward, backward, and the norms with which DoRA begins."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from shoal.adapters import MAX_LAYERS, Module
from shoal.protocol.limits import (
    MAX_BLOCKS,
    MAX_FACTORS,
    MAX_SUMMED_PASSES,
    Block,
    Digest,
    Link,
    PassId,
    Seed,
)
from shoal.protocol.message import ComputationMessage, Message, SpanMessage
from shoal.protocol.session import Downstream, Upstream
from shoal.tensors import Encoding, TensorName


def _packed(indices: tuple[int, ...]) -> str:
    packed = bytearray(max(indices, default=-1) // 8 + 1)
    for index in indices:
        packed[index // 8] |= 1 << index % 8
    return packed.hex()


def _unpacked(indices: object) -> object:
    if isinstance(indices, tuple):  # made by our own code: JSON has no tuples
        return indices
    if not isinstance(indices, str) or len(indices) > MAX_FACTORS // 4:
        raise ValueError(f"not up to {MAX_FACTORS} bits in hexadecimal digits")
    packed = bytes.fromhex(indices)
    return tuple(index for index in range(8 * len(packed)) if packed[index // 8] >> index % 8 & 1)


FactorIndices = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_FACTORS)], ...], BeforeValidator(_unpacked), PlainSerializer(_packed)
]
"""Numbers of factors' tensors. They travel as bits in hexadecimal digits, eight bits a byte, the lowest bit first."""


class Norms(SpanMessage):
    """Client: what are the norms of the rows of these linear layers' weights, in the one block of this span?

    DoRA's magnitudes begin with them. Servers that offer training answer with `NormsResult`. No layer is named twice.
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


class PassMessage(ComputationMessage):
    """Client: a part of a pass, which may be one of a ring of servers.

    With a `downstream` server, the server pushes its outputs there (`PassInputs`) beside answering them. With an
    `upstream` server, the client does not send the inputs of this kind of message, `pushed`: that server pushes them,
    and the answer travels in this `encoding`.
    """

    pushed: ClassVar[TensorName]
    encoding: Encoding = "raw"
    upstream: Upstream | None = None
    downstream: Downstream | None = None

    @model_validator(mode="after")
    def _inputs_come_once(self) -> PassMessage:
        if self.upstream is not None and any(spec.name == self.pushed for spec in self.tensors):
            raise ValueError("inputs that are sent and pushed")
        return self


class Forward(PassMessage):
    """Client: compute the span without a cache. Answered by `PassResult` or `NotCached`.

    Tensors: `hidden` [B, T, D]; optionally `positions` [B, T] int64 and the padding `mask` [B, T] uint8. With `keep`, a
    `Backward` of that id will follow, and the server may keep what it needs. What adapters with a dropout drop follows
    from the `seed`; without one, they drop nothing.
    """

    carries = ("hidden", "positions", "mask")
    pushed = "hidden"
    kind: Literal["forward"] = "forward"
    keep: PassId | None = None
    seed: Seed | None = None


class Backward(PassMessage):
    """Client: compute the gradients of the span's factors and, if `inputs` is true, of its inputs.

    Answered by `PassResult` or `NotCached`. Tensors: `grad` [B, T, D], the gradient of the outputs; and the tensors of
    the `Forward`, unless the server should have `kept` what it needs under that id. The factors of `frozen` blocks need
    no gradient. In a ring, the `upstream` server has the blocks after these: gradients go the other way round. The
    gradients of the factors are added `into` the client's sum of that name, if the server has room for one, and are not
    answered then (`TakeSum`). All passes of a sum have the same span, `adapters` and `frozen` blocks.
    """

    carries = ("hidden", "positions", "mask", "grad")
    pushed = "grad"
    kind: Literal["backward"] = "backward"
    kept: PassId | None = None
    seed: Seed | None = None
    inputs: bool = True
    frozen: Annotated[tuple[Block, ...], Field(max_length=MAX_BLOCKS, strict=False)] = ()
    into: PassId | None = None

    @model_validator(mode="after")
    def _frozen_blocks_are_here(self) -> Backward:
        if any(not self.start <= block < self.end for block in self.frozen):
            raise ValueError("frozen blocks outside of the span")
        return self


class PassInputs(Message):
    """Upstream server: what the pass is computed from that waits for pushes over this `link`.

    Tensors: `hidden` [B, T, D] for a `Forward`, or `grad` [B, T, D] for a `Backward`.
    """

    carries = ("hidden", "grad")
    kind: Literal["pass_inputs"] = "pass_inputs"
    link: Link


class PassResult(Message):
    """Server: the answer to a `Forward` or a `Backward`.

    To a `Forward` it has `hidden` [B, T, D], the outputs of the span. To a `Backward` it has `grad` [B, T, D], the
    gradient of the inputs, if that was wanted, and `factor_grads` [F], the gradients of the factors of the span's
    adapters, block after block, in the dtype of the factors. The other tensors have the dtype and the encoding of the
    request's `hidden` or `grad`. `unused` are the numbers, counted over all blocks, of the factors' tensors that had no
    part in the computation: they have no gradient. `inputs` is the digest of what was pushed to the server
    (`shoal.net.signing.token_digests`), by which the client knows whether that is what the other server answered. The
    gradients of the factors are not here but in a sum if they are `summed`.
    """

    carries = ("hidden", "grad", "factor_grads")
    kind: Literal["pass_result"] = "pass_result"
    unused: FactorIndices = ()
    inputs: Digest | None = None
    summed: bool = False


class TakeSum(Message):
    """Client: what is the sum of this name (`Backward.into`)? Answered by `SumResult` or, as `kept`, by `NotCached`.

    The server forgets it. With `keeps_rest`, what rounding takes away from the sum stays under that name, once.
    """

    kind: Literal["take_sum"] = "take_sum"
    name: PassId
    keeps_rest: bool = False


class SumResult(Message):
    """Server: the answer to `TakeSum`.

    Tensor: `factor_grads` [F], float32, the sum of what `num_passes` passes have found. `unused` are the numbers of the
    factors' tensors that had no part in any of them.
    """

    carries = ("factor_grads",)
    kind: Literal["sum_result"] = "sum_result"
    num_passes: Annotated[int, Field(ge=1, le=MAX_SUMMED_PASSES)]
    unused: FactorIndices = ()


class NormsResult(Message):
    """Server: the answer to `Norms`. Tensor: `factors` [F], float32, the norms of one layer's rows after another's."""

    carries = ("factors",)
    kind: Literal["norms_result"] = "norms_result"
