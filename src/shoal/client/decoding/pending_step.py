"""What a server has been asked for, and whether that is what it answers."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.client.head.logits import LogitsRequest
from shoal.net.wire.codec import Tensors
from shoal.protocol import StepResult
from shoal.tensors import Encoding


@dataclass(frozen=True)
class PendingStep:
    """A step that the server is to answer: sent by us or, in the ring, by the server before.

    With `num_logits`, the output head's answer for so many tokens is wanted, not the outputs that are not skipped.
    """

    epoch: int
    position: int
    inputs: torch.Size  # [B, T, D]
    dtype: torch.dtype
    logits_request: LogitsRequest | None
    num_logits: int
    usual_seconds: float
    skip: int = 0
    pushed: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.position

    @property
    def end(self) -> int:
        return self.position + self.inputs[1]

    @property
    def num_bytes(self) -> int:
        """What travels to the server."""
        return self.inputs.numel() * self.dtype.itemsize

    def wrong(self, result: StepResult, tensors: Tensors, encoding: Encoding) -> str | None:
        """What is wrong with an answer, as far as shapes and kinds tell; `encoding` is that which was asked for."""
        batch_size, num_tokens, hidden_size = self.inputs
        other = "something else than was asked"
        if self.logits_request is None:
            hidden, num_wanted = tensors.get("hidden"), num_tokens - self.skip
            if not num_wanted:
                return None if hidden is None else other
            if hidden is None or hidden.shape != (batch_size, num_wanted, hidden_size) or hidden.dtype != self.dtype:
                return other
            if (found := result.encoding_of("hidden")) not in ("raw", encoding):
                return f"in {found}, which nobody asked for"
            return None
        values, ids = tensors.get("logits"), tensors.get("ids")
        if not self.num_logits:
            return None if values is None and ids is None else other
        shape = (batch_size, self.num_logits, self.logits_request.width)
        if values is None or values.shape != shape or values.dtype != self.dtype:
            return other
        if result.encoding_of("logits") != "raw" or (ids is None) != (self.logits_request.top_k is None):
            return other
        return other if ids is not None and (ids.shape != shape or not self.logits_request.are_tokens(ids)) else None
