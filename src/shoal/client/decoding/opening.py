"""What a server was sent to open a session, and whether its answer fits that."""

# B sequences, S tokens, D hidden size

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.client.swarm.answers import finite
from shoal.net.wire.codec import Tensors
from shoal.prefix import PAGE_TOKENS
from shoal.protocol import Open, Opened
from shoal.tensors import Encoding


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
