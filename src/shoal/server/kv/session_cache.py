"""One client's decoding state in this server's blocks: which pages are whose, and what they are called."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.model.body_cache import BodyCache
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.prefix import PAGE_TOKENS, page_hashes, root_hash
from shoal.server.kv.pages import PagePool, pages_for
from shoal.server.step_inputs import StepInputs
from shoal.spans import Span


@dataclass(frozen=True)
class Growth:
    """What is to be done in the cache before a session's next tokens: first pages to copy, then new ones to clear."""

    copies: tuple[tuple[int, int], ...]
    taken: tuple[int, ...]


class Row:
    """One sequence: its pages, and the names of those that are full, as far as they are known.

    A name needs all inputs of its page, so those of the last page, which is not full, are kept.
    """

    def __init__(self, first_name: bytes | None, pages: Sequence[int] = (), names: Sequence[bytes] = ()) -> None:
        self.pages = list(pages)
        self.names = list(names)
        self._first_name = first_name  # None: this sequence is nobody's beginning
        self._unnamed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self) -> Row:
        """The same sequence, continued otherwise."""
        row = Row(self._first_name, self.pages, self.names)
        row._unnamed = list(self._unnamed)
        return row

    def crop(self, num_tokens: int) -> list[int]:
        """Forget what follows the first `num_tokens` tokens; returns the pages that this takes."""
        keep = pages_for(num_tokens)
        dropped, self.pages = self.pages[keep:], self.pages[:keep]
        in_names = len(self.names) * PAGE_TOKENS
        if num_tokens >= in_names:
            self._unnamed = _first(self._unnamed, num_tokens - in_names)
        elif num_tokens % PAGE_TOKENS == 0:
            self.names, self._unnamed = self.names[:keep], []
        else:  # the inputs of the page that is cut are gone: what follows can have no name
            self.names, self._unnamed, self._first_name = self.names[: keep - 1], [], None
        return dropped

    def name(self, hidden_TD: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Find the names of the pages that these inputs fill."""
        if self._first_name is None:
            return
        self._unnamed.append((hidden_TD, positions_T))
        if sum(len(positions) for _, positions in self._unnamed) < PAGE_TOKENS:
            return
        hidden, positions = (torch.cat(parts) for parts in zip(*self._unnamed, strict=True))
        names = page_hashes(self.names[-1] if self.names else self._first_name, hidden, positions)
        self.names += names
        rest = len(names) * PAGE_TOKENS
        self._unnamed = [(hidden[rest:].clone(), positions[rest:])]


class SessionCache:
    """The state of a batch of sequences that are continued together.

    A body that computes packed keeps it in pages; for others `cache` is Transformers' own, and the pages only count
    what memory that takes.
    """

    def __init__(
        self,
        pool: PagePool,
        span: Span,
        *,
        opened: int,
        peer: str,
        salt: str,
        batch_size: int,
        adapters: Mapping[int, BlockAdapter] | None = None,
    ) -> None:
        self.span = span
        self.adapters = adapters or {}
        self.opened = opened  # the number of those that were opened before: its age
        self.peer = peer  # whose it is
        self.used_at = self.began_at = float("-inf")  # when it was asked for something last; when it was let in
        self.num_tokens = 0
        self.batch_size = batch_size
        self.rows: list[Row] = []
        self.mask_BS: torch.Tensor | None = None  # None while no sequence is padded
        self.cache: BodyCache | None = None
        self.running = False  # whether anything of it was computed here, or is just now
        self.preempted = False
        self.arrived_at: float | None = None  # its last step of decoding, and how long after the one before
        self.period: float | None = None
        self._pool = pool
        self._root = root_hash(span, salt)

    @property
    def pages(self) -> list[int]:
        """All that it holds; a page that several of its rows share is named for each."""
        return [page for row in self.rows for page in row.pages]

    def arrives(self, now: float, *, decodes: bool) -> None:
        """A step of it came: the next one may be expected as long after it as this came after the last."""
        self.period = now - self.arrived_at if decodes and self.arrived_at is not None else None
        self.arrived_at = now

    @property
    def expected_at(self) -> float | None:
        """When its next step of decoding will come, if it goes on as it did."""
        return None if self.arrived_at is None or self.period is None else self.arrived_at + self.period

    def adopt(self, names: Sequence[Sequence[bytes]], most_pages: int) -> None:
        """Begin with the pages of these names, for each row, as far as all rows have them."""
        known = [self._pool.known(each[:most_pages]) for each in names]
        num_pages = min(len(pages) for pages in known)
        self.rows = [
            Row(self._root, pages[:num_pages], each[:num_pages]) for pages, each in zip(known, names, strict=True)
        ]
        self._pool.share(self.pages)
        self.num_tokens = num_pages * PAGE_TOKENS

    def begin(self, position: int, rows: Sequence[int] | None, inputs: StepInputs) -> None:
        """Go back to where a step starts, with the rows that it continues."""
        if position == 0:
            self.release()
            self.mask_BS = None
            self.rows = [Row(self._root) for _ in range(inputs.batch_size)]
        for row in self.rows:
            self._pool.release(row.crop(position))
        if rows is not None:
            before = self.rows
            self.rows = [before[index].copy() for index in rows]
            if self.cache is None:
                self._pool.share(self.pages)
            else:  # Transformers' cache has copied its rows: each takes memory of its own
                self.rows = [Row(None) for _ in rows]
            self._pool.release(page for row in before for page in row.pages)
        self.num_tokens = position
        self.batch_size = inputs.batch_size
        self._extend_mask(rows, inputs)

    def _extend_mask(self, rows: Sequence[int] | None, inputs: StepInputs) -> None:
        if self.mask_BS is None and (inputs.mask_BT is None or inputs.mask_BT.all()):
            return
        if self.mask_BS is None:
            mask_BS = torch.ones((self.batch_size, self.num_tokens), dtype=torch.int64)
        else:
            mask_BS = self.mask_BS if rows is None else self.mask_BS[list(rows)]
        new_BT = inputs.mask_BT
        if new_BT is None:
            new_BT = torch.ones((self.batch_size, inputs.num_tokens), dtype=torch.int64)
        self.mask_BS = torch.cat((mask_BS[:, : self.num_tokens], new_BT), dim=1)

    def name(self, inputs: StepInputs) -> None:
        """Find the names of the pages that a step's inputs fill. Padded sequences have none."""
        if self.cache is not None or self.mask_BS is not None:
            return
        positions_BT = inputs.positions_BT
        if positions_BT is None:
            positions_T = torch.arange(self.num_tokens, self.num_tokens + inputs.num_tokens)
            positions_BT = positions_T.expand(self.batch_size, -1)
        rows = self.rows
        if not rows:  # they were given up meanwhile
            return
        for row, hidden_TD, positions_T in zip(rows, inputs.hidden_BTD, positions_BT, strict=True):
            row.name(hidden_TD, positions_T)

    def pages_needed(self, num_tokens: int) -> int:
        """How many pages are taken at most for so many more tokens of every row."""
        pages = pages_for(self.num_tokens + num_tokens)
        return sum(pages - len(row.pages) + self._is_to_be_copied(row) for row in self.rows)

    def grow(self, num_tokens: int) -> Growth:
        """Take pages for more tokens of every row. It is for the caller to know that they are available."""
        self.running = True
        taken: list[int] = []
        copies: list[tuple[int, int]] = []
        for row in self.rows:
            if self._is_to_be_copied(row):
                (page,) = self._pool.take(1)
                copies.append((row.pages[-1], page))
                self._pool.release([row.pages[-1]])
                row.pages[-1] = page
            pages = self._pool.take(pages_for(self.num_tokens + num_tokens) - len(row.pages))
            row.pages += pages
            taken += pages
        return Growth(tuple(copies), tuple(taken))

    def _is_to_be_copied(self, row: Row) -> bool:
        """Whether its next token goes into a page that is not its alone."""
        running = self.num_tokens % PAGE_TOKENS > 0 and pages_for(self.num_tokens) == len(row.pages)
        return running and self._pool.is_shared(row.pages[-1])

    def computed(self, num_tokens: int) -> None:
        """So many more tokens of every row are in the cache; the pages that are full now may be found by others."""
        before = self.num_tokens // PAGE_TOKENS
        self.num_tokens += num_tokens
        full = self.num_tokens // PAGE_TOKENS
        for row in self.rows:
            for page, name in zip(row.pages[before:full], row.names[before:full], strict=False):
                self._pool.know(page, name)

    def release(self) -> None:
        """Give all pages back. May be called twice."""
        self._pool.release(self.pages)
        self.rows = []
        self.num_tokens = 0
        self.running = False

    def preempt(self) -> None:
        """Give all pages to somebody else. The session is of no more use: its client has to begin another."""
        self.preempted = True
        self.release()


def _first(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for hidden, positions in pieces:
        if num_tokens <= 0:
            break
        kept.append((hidden[:num_tokens], positions[:num_tokens]))
        num_tokens -= len(positions)
    return kept
