"""Where the answers of servers go."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

from typing import Protocol

import torch

from shoal.client.head.logits import Logits, LogitsRequest
from shoal.client.swarm.answers import joined
from shoal.protocol import MAX_LENGTH


class Sink(Protocol):
    """Where a server's outputs go: into the history of the next stage, or to the caller of the step."""

    @property
    def num_tokens(self) -> int:
        """Of how many tokens the outputs are known."""
        ...

    def append(self, outputs_BTD: torch.Tensor, start: int) -> None:
        """Add outputs of the tokens from `start` on, which leaves no gap. Those that are known already are ignored."""
        ...


class Outputs:
    """What the last server answers for the tokens from `position` on: hidden states of all, or logits.

    Those are wanted of the tokens from `logits_from` on, by default of all too.
    """

    def __init__(self, position: int, *, logits_from: int | None = None) -> None:
        self.num_tokens = position
        self.logits: list[Logits] = []
        self.logits_from = position if logits_from is None else logits_from
        self._pieces: list[torch.Tensor] = []

    @classmethod
    def of_step(cls, position: int, end: int, logits_request: LogitsRequest | None) -> Outputs:
        """For the tokens between two positions, or the logits of as many last ones as are asked for."""
        return cls(position, logits_from=None if logits_request is None else end - logits_request.num_tokens)

    def append(self, outputs_BTD: torch.Tensor, start: int) -> None:
        assert start <= self.num_tokens
        new_BTD = outputs_BTD[:, self.num_tokens - start :]
        if new_BTD.shape[1]:
            self._pieces.append(new_BTD)
            self.num_tokens += new_BTD.shape[1]

    def move_to(self, sink: Sink) -> None:
        """Give all of it to another sink, which knows no fewer tokens than were known when this one began."""
        start = self.num_tokens - sum(piece.shape[1] for piece in self._pieces)
        if isinstance(sink, Outputs):
            sink.logits[:] = self.logits  # they answer what the sink's own answer, and are of one server
        for piece_BTD in self._pieces:
            sink.append(piece_BTD, start)
            start += piece_BTD.shape[1]

    def joined(self) -> torch.Tensor | Logits:
        """The hidden states [B, T, D] of all tokens, or all logits."""
        if self.logits:
            return Logits.joined(self.logits)
        return joined(self._pieces, dim=1)

    def take(self, end: int) -> torch.Tensor | Logits:
        """The same of the tokens before `end`, all of which are known. Those of later tokens stay."""
        found = self.joined()
        if isinstance(found, Logits):
            found, later = found.split(end - self.logits_from)
            self.logits, self.num_tokens = [] if later is None else [later], end
        else:
            num_taken = end - (self.num_tokens - found.shape[1])
            self._pieces = [found[:, num_taken:]] if num_taken < found.shape[1] else []
            found = found[:, :num_taken]
        self.logits_from = end
        return found


class NoOutputs(Outputs):
    """Takes outputs that nothing needs: those of a standby, or of a replay."""

    def __init__(self) -> None:
        super().__init__(MAX_LENGTH)

    def append(self, outputs_BTD: torch.Tensor, start: int) -> None:
        pass


def beside(sink: Sink) -> Outputs:
    """Where a second server's outputs go, which may become those of `sink`."""
    if isinstance(sink, NoOutputs):
        return NoOutputs()
    return Outputs(sink.num_tokens, logits_from=sink.logits_from if isinstance(sink, Outputs) else None)
