"""What a step or a pass is computed from, once a server has validated it."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.tensors import TensorName

Tensors = Mapping[TensorName, torch.Tensor]


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step or a pass: floating-point hidden states, int64 positions, and an int64 mask of padding.

    All are of the same batch size and number of tokens. The mask is 0 where a token is padding.
    """

    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None
    mask_BT: torch.Tensor | None

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return self.hidden_BTD.shape[0]

    @property
    def num_tokens(self) -> int:
        """The new tokens of each sequence."""
        return self.hidden_BTD.shape[1]

    @property
    def size(self) -> int:
        """The new tokens of all sequences."""
        return self.batch_size * self.num_tokens

    @property
    def num_bytes(self) -> int:
        """The memory that all tensors take."""
        tensors = (self.hidden_BTD, self.positions_BT, self.mask_BT)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def tensors_to_push(self, outputs_BTD: torch.Tensor) -> Tensors:
        """The tensors of the same step on the next server, whose inputs are these outputs."""
        tensors: dict[TensorName, torch.Tensor] = {"hidden": outputs_BTD}
        if self.positions_BT is not None:
            tensors["positions"] = self.positions_BT
        if self.mask_BT is not None:
            tensors["mask"] = self.mask_BT.to(torch.uint8)
        return tensors


@dataclass(frozen=True)
class WantedLogits:
    """The logits of the last `num_tokens` tokens, instead of hidden states: of the `top_k` likeliest, or of all."""

    num_tokens: int
    top_k: int | None

    def before(self, num_left: int) -> WantedLogits:
        """What is wanted of a step's first tokens when `num_left` others follow them."""
        return WantedLogits(max(0, self.num_tokens - num_left), self.top_k)
