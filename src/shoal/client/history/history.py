"""The inputs of one server: its cache can be rebuilt from them on any server (arXiv 2312.08361, algorithm 1)."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from shoal.client.history.history_store import HistoryStore, StoredPiece

Rows = tuple[int, ...]
"""A rearrangement of the batch: sequence i continues the one that was `rows[i]`."""

BLOCK_TOKENS = 64
"""The most tokens of a sequence that are put into the store as one piece, so that a crop opens little."""
BLOCK_BYTES = 1 << 20
"""The most bytes of such a piece, unless one token of every sequence is larger: a wide batch gets shorter pieces."""


class History:
    """A log of [B, T, D] pieces and of rearrangements of the batch. It becomes one tensor only when that is needed.

    The cost of appending and rearranging does not grow with the length. Beam search rearranges at every step.

        appended      64 tokens │ 64 tokens │ rows │ 64 tokens │ 1 │ rows │ 1 │ rows │ 1
        in the store  ══════════╪═══════════╪══════╪══════════>│ open: less than a block, as it was appended

    A block goes into the store in its present arrangement. The rearrangements since the block before become one entry
    in front of it. A crop opens the block in which it ends.
    """

    def __init__(self, store: HistoryStore) -> None:
        self.num_tokens = 0
        self._store = store
        self._log: list[torch.Tensor | StoredPiece | Rows] = []
        self._num_open = 0  # tokens, all of them after those in the store
        self._block_tokens = BLOCK_TOKENS

    @property
    def num_entries(self) -> int:
        """The length of the log."""
        return len(self._log)

    def append(self, piece_BTD: torch.Tensor) -> None:
        """Add inputs [B, T, D]. They stay exact until they are settled."""
        self._block_tokens = max(1, min(BLOCK_TOKENS, BLOCK_BYTES // piece_BTD[:, :1].nbytes))
        self._log.append(self._compact(piece_BTD))
        self.num_tokens += piece_BTD.shape[1]
        self._num_open += piece_BTD.shape[1]

    def _compact(self, piece_BTD: torch.Tensor) -> torch.Tensor:
        """A piece that stays open for long. It must not keep the large tensor alive that it was cut from."""
        return piece_BTD.clone() if piece_BTD.shape[1] < self._block_tokens else piece_BTD

    def settle(self, num_tokens: int) -> None:
        """Put the first `num_tokens` into the store, in whole blocks: they are needed only if a server fails."""
        start = self.num_tokens - self._num_open
        num_blocks = (min(num_tokens, self.num_tokens) - start) // self._block_tokens
        if num_blocks <= 0:
            return
        middle = start + num_blocks * self._block_tokens
        settled, still_open = self._parts(start, middle), self._parts(middle, self.num_tokens)
        first = len(self._log)
        while first and not isinstance(self._log[first - 1], StoredPiece):
            first -= 1
        rows = _composed(entry for entry in reversed(self._log[first:]) if isinstance(entry, tuple)) if first else None
        self._log[first:] = [] if rows is None else [rows]
        self._log.extend(self._store.put(block) for block in _joined(settled).split(self._block_tokens, dim=1))
        self._log.extend(self._compact(piece) for piece in still_open)
        self._num_open = self.num_tokens - middle

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        if self._log:
            self._log.append(tuple(rows))

    def crop(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`. The rearrangements since then stay."""
        later: list[torch.Tensor | Rows] = []
        while self.num_tokens > num_tokens:
            entry = self._log.pop()
            if isinstance(entry, tuple):
                later.append(entry)
                continue
            num_left = max(0, num_tokens - (self.num_tokens - entry.shape[1]))
            self.num_tokens -= entry.shape[1] - num_left
            self._num_open += num_left
            if isinstance(entry, torch.Tensor):
                self._num_open -= entry.shape[1]
            if num_left:
                later.append(self._compact(_tensor_of(entry)[:, :num_left]))
        self._log.extend(reversed(later))
        if not self.num_tokens:
            self._log.clear()  # old rearrangements mean nothing to the batch that may follow

    def since(self, position: int) -> torch.Tensor:
        """The inputs [B, S - position, D] from `position` on, in the present arrangement of the batch."""
        return self.between(position, self.num_tokens)

    def between(self, start: int, end: int) -> torch.Tensor:
        """The inputs [B, end - start, D] of at least one token, in the present arrangement of the batch."""
        return _joined(self._parts(start, end))

    def _parts(self, start: int, end: int) -> list[torch.Tensor]:
        parts: list[torch.Tensor] = []
        rows: Rows | None = None
        last = self.num_tokens
        for entry in reversed(self._log):
            if last <= start:
                break
            if isinstance(entry, tuple):
                rows = entry if rows is None else _composed((rows, entry))
                continue
            first = last - entry.shape[1]
            if first < end:
                part = _tensor_of(entry)[:, max(0, start - first) : end - first]
                parts.append(part if rows is None else part[list(rows)])
            last = first
        return parts[::-1]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


def _tensor_of(entry: torch.Tensor | StoredPiece) -> torch.Tensor:
    return entry if isinstance(entry, torch.Tensor) else entry.get()


def _composed(latest_first: Iterable[Rows]) -> Rows | None:
    """One rearrangement that has the effect of several; None if there are none."""
    result: Rows | None = None
    for rows in latest_first:
        result = rows if result is None else tuple(rows[row] for row in result)
    return result
