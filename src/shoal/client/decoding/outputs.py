"""Where what servers answer goes."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

from typing import Protocol

import torch

from shoal.client.head.logits import Logits
from shoal.client.swarm.answers import joined
from shoal.protocol import MAX_LENGTH


class Sink(Protocol):
    """Where a server's outputs go: into the history of the next, or to who asked for the step."""

    @property
    def num_tokens(self) -> int:
        """How many tokens it has already."""
        ...

    def append(self, outputs_BTD: torch.Tensor, start: int) -> None:
        """Outputs for the tokens from `start` on, which is no gap away; what is known already is left out."""
        ...


class Outputs:
    """What the last server gives for the tokens from `position` on: hidden states, or the answer to a question."""

    def __init__(self, position: int) -> None:
        self.num_tokens = position
        self.logits: list[Logits] = []
        self._pieces: list[torch.Tensor] = []

    def append(self, outputs_BTD: torch.Tensor, start: int) -> None:
        assert start <= self.num_tokens
        new_BTD = outputs_BTD[:, self.num_tokens - start :]
        if new_BTD.shape[1]:
            self._pieces.append(new_BTD)
            self.num_tokens += new_BTD.shape[1]

    def joined(self) -> torch.Tensor | Logits:
        """All of it."""
        if self.logits:
            return Logits.joined(self.logits)
        return joined(self._pieces, dim=1)


class NoOutputs(Outputs):
    """For whom nobody wants outputs of."""

    def __init__(self) -> None:
        super().__init__(MAX_LENGTH)

    def append(self, outputs_BTD: torch.Tensor, start: int) -> None:
        pass
