"""The messages with which a peer measures its network: bytes that mean nothing, to a neighbor and back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.protocol.limits import MAX_TRANSFER_BYTES
from shoal.protocol.message import Message

NumBytes = Annotated[int, Field(ge=0, le=MAX_TRANSFER_BYTES, multiple_of=16)]


class Transfer(Message):
    """A peer that measures its network: may it send a `Filler` of `num_bytes` bytes, or does it get one?

    Answered by a `Filler` of the bytes that it `wants`, or by a `Failure` if it wants too much. If it `sends`, the
    answer is an empty `Filler`; then it sends its own, which is answered by another empty one with the digest.
    """

    kind: Literal["transfer"] = "transfer"
    sends: NumBytes = 0
    wants: NumBytes = 0

    @model_validator(mode="after")
    def _one_direction(self) -> Transfer:
        if bool(self.sends) == bool(self.wants):
            raise ValueError("not one of the two directions")
        return self


class Filler(Message):
    """Tensor: `filler` [N] uint8 (optional), bytes that mean nothing.

    `digest` is BLAKE2b (16 bytes, in hexadecimal) over the `filler` that came before in the other direction. It proves
    that all of it had come.
    """

    carries = ("filler",)
    kind: Literal["filler"] = "filler"
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None

    @model_validator(mode="after")
    def _is_not_too_large(self) -> Filler:
        if self.payload_bytes > MAX_TRANSFER_BYTES:
            raise ValueError("too many bytes")
        return self
