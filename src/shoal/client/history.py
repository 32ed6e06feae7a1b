"""The inputs that a server was sent: what its cache can be rebuilt from, anywhere (arXiv 2312.08361, algorithm 1)."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

Rows = tuple[int, ...]


class History:
    """A log of [B, T, D] pieces and of rearrangements of the batch, rebuilt into one tensor only when it is needed.

    Appending and rearranging cost nothing that grows with the length, although beam search rearranges at every step.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._log: list[torch.Tensor | Rows] = []

    def append(self, piece_BTD: torch.Tensor) -> None:
        self._log.append(piece_BTD)
        self.num_tokens += piece_BTD.shape[1]

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i is the one that was `rows[i]`."""
        if self._log:
            self._log.append(tuple(rows))

    def crop(self, num_tokens: int) -> None:
        """Forget what follows the first `num_tokens` tokens; the rearrangements since then stay."""
        later: list[torch.Tensor | Rows] = []
        while self.num_tokens > num_tokens:
            entry = self._log.pop()
            if isinstance(entry, torch.Tensor):
                kept = max(0, num_tokens - (self.num_tokens - entry.shape[1]))
                self.num_tokens -= entry.shape[1] - kept
                if kept:
                    later.append(entry[:, :kept])
            else:
                later.append(entry)
        self._log.extend(reversed(later))

    def pieces(self, position: int, num_tokens: int) -> Iterator[torch.Tensor]:
        """The inputs from `position` on, in pieces of at most `num_tokens` tokens; none if there are no more."""
        if position < self.num_tokens:
            yield from self.since(position).split(num_tokens, dim=1)

    def since(self, position: int) -> torch.Tensor:
        """The inputs from `position` on, [B, S - position, D], as the batch is arranged now."""
        pieces: list[torch.Tensor] = []
        rows: list[int] | None = None
        end = self.num_tokens
        for entry in reversed(self._log):
            if end <= position:
                break
            if isinstance(entry, torch.Tensor):
                start = end - entry.shape[1]
                piece = entry[:, max(0, position - start) :]
                pieces.append(piece if rows is None else piece[rows])
                end = start
            else:
                rows = list(entry) if rows is None else [entry[row] for row in rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1], dim=1)
