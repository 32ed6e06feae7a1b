"""What a step or a pass is computed from, once it has been validated."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.tensors import TensorName

Tensors = Mapping[TensorName, torch.Tensor]


@dataclass(frozen=True)
class StepInputs:
    """The tensors of a step or a pass, of one batch and one length."""

    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None
    mask_BT: torch.Tensor | None

    @property
    def batch_size(self) -> int:
        return self.hidden_BTD.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.hidden_BTD.shape[1]


@dataclass(frozen=True)
class WantedLogits:
    """The logits of so many of the last tokens, instead of hidden states: of all tokens, or of the likeliest only."""

    num_tokens: int
    top_k: int | None

    def before(self, num_left: int) -> WantedLogits:
        """What is wanted of a step's first tokens, if so many others follow."""
        return WantedLogits(max(0, self.num_tokens - num_left), self.top_k)
