"""What a server was asked for, a step or to open a session, and whether an answer fits it."""

# B sequences, T new tokens, S tokens, D hidden size

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.client.head.logits import LogitsRequest
from shoal.client.swarm.answers import OTHER_THAN_ASKED, finite, wrong_with
from shoal.net.wire.codec import Tensors
from shoal.policy.routing.route import SLOWEST, Hop
from shoal.prefix import PAGE_TOKENS
from shoal.protocol import Open, Opened, StepResult
from shoal.tensors import Encoding


@dataclass(frozen=True)
class PendingStep:
    """A step that a server has to answer. The client sends it or, if it is `pushed`, the server before in the ring.

    `inputs` is the shape of its inputs. The first `skip` outputs are not wanted. With a `logits_request`, the logits
    of the last `num_logits` tokens are wanted instead of outputs. The server usually takes `usual_seconds`.
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
        """The epoch and position by which the server names the step."""
        return self.epoch, self.position

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.position + self.inputs[1]

    @property
    def num_bytes(self) -> int:
        """The size of the inputs that travel to the server."""
        return self.inputs.numel() * self.dtype.itemsize

    def wrong(self, result: StepResult, tensors: Tensors, encoding: Encoding) -> str | None:
        """What is wrong with an answer, as far as shapes and dtypes tell; None if nothing is.

        `encoding` is the one that was asked for.
        """
        batch_size, num_tokens, hidden_size = self.inputs
        other = OTHER_THAN_ASKED
        if self.logits_request is None:
            hidden, num_wanted = tensors.get("hidden"), num_tokens - self.skip
            if not num_wanted:
                return None if hidden is None else other
            shape = torch.Size((batch_size, num_wanted, hidden_size))
            return wrong_with(hidden, result.encoding_of("hidden"), shape=shape, dtype=self.dtype, allowed=encoding)
        values, ids = tensors.get("logits"), tensors.get("ids")
        if not self.num_logits:
            return None if values is None and ids is None else other
        shape = torch.Size((batch_size, self.num_logits, self.logits_request.width))
        if values is None or values.shape != shape or values.dtype != self.dtype:
            return other
        if result.encoding_of("logits") != "raw" or (ids is None) != (self.logits_request.top_k is None):
            return other
        return other if ids is not None and (ids.shape != shape or not self.logits_request.are_tokens(ids)) else None


def usual_seconds(hop: Hop, num_tokens: int) -> float:
    """How many seconds a server takes for a step of `num_tokens` tokens, as it announces, if nothing else runs."""
    server = hop.server
    speed = server.decode_speed if num_tokens == 1 else server.prefill_speed
    return num_tokens * len(hop.span) / len(server.span) / max(speed or 0.0, SLOWEST)


@dataclass(frozen=True)
class Opening:
    """The tokens that a server was offered by name, and those of them whose outputs the client has already.

    `answer` is what the server said, unchecked; None until it has answered.
    """

    num_offered: int
    num_skipped: int
    answer: tuple[Opened, Tensors] | None = None

    @classmethod
    def of(cls, request: Open, digests: torch.Tensor | None) -> Opening:
        """What `request` offers with these `digests` [B, pages, 16]."""
        return cls(0 if digests is None else digests.shape[1] * PAGE_TOKENS, request.skip)

    @property
    def num_said(self) -> int:
        """How many tokens the server says that it has in its cache."""
        return 0 if self.answer is None else self.answer[0].num_tokens

    def is_wrong(
        self, opened: Opened, outputs_BSD: torch.Tensor | None, like_B1D: torch.Tensor, wire: Encoding
    ) -> bool:
        """Whether the server knows other tokens than it was offered, or sends outputs that cannot be theirs.

        `wire` is the encoding that was asked for.
        """
        num_known = opened.num_tokens
        if num_known > self.num_offered or (outputs_BSD is not None) != (num_known > self.num_skipped):
            return True
        if outputs_BSD is None:
            return False
        batch_size, _, hidden_size = like_B1D.shape
        return (
            outputs_BSD.shape != (batch_size, num_known - self.num_skipped, hidden_size)
            or not outputs_BSD.is_floating_point()
            or not finite(outputs_BSD)
            or opened.encoding_of("hidden") not in ("raw", wire)
        )
