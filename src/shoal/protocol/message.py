"""What every message has: the tensors that it declares, and the blocks that it is about."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from shoal.protocol.limits import (
    Adapted,
    Block,
    Goodput,
    Text,
)
from shoal.strict import Strict
from shoal.tensors import Encoding, TensorName, TensorSpec


class Message(Strict):
    """One header: the fields of a message, and the `tensors` that follow it, of those that its kind `carries`.

    A peer that unpacks tensors says now and then with which `goodput` large frames come from the other one: bytes per
    second, 0 while it does not know. The other one may pack what it sends from then on.
    """

    carries: ClassVar[tuple[TensorName, ...]] = ()
    tensors: Annotated[tuple[TensorSpec, ...], Field(max_length=4, strict=False)] = ()
    goodput: Goodput | None = None

    @model_validator(mode="after")
    def _tensors_belong_here(self) -> Message:
        names = [spec.name for spec in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is declared twice")
        if unexpected := [name for name in names if name not in self.carries]:
            raise ValueError(f"it carries no {unexpected[0]}")
        return self

    def encoding_of(self, name: TensorName) -> Encoding:
        """How one of its tensors travels; "raw" for one that it does not have."""
        return next((spec.encoding for spec in self.tensors if spec.name == name), "raw")

    @property
    def payload_bytes(self) -> int:
        """The length of the payload that carries its tensors."""
        return sum(spec.aligned_nbytes for spec in self.tensors)


class SpanMessage(Message):
    """A request about the blocks `start` to `end` of a model, whose weights have this `fingerprint`."""

    model: Text
    fingerprint: Text
    start: Block
    end: Block

    @model_validator(mode="after")
    def _span_is_not_empty(self) -> SpanMessage:
        if self.start >= self.end:
            raise ValueError("an empty span")
        return self


class ComputationMessage(SpanMessage):
    """A computation on a span with `adapters`, by the names under which the server has stored them (`Adapter`)."""

    adapters: Adapted = ()

    @model_validator(mode="after")
    def _every_block_is_named(self) -> ComputationMessage:
        if len(self.adapters) not in (0, self.end - self.start):
            raise ValueError("adapters for other blocks than the span's")
        return self
