"""What a server keeps of one session: the pages of its sequences, and the digests of those that are full.

One sequence with 6 tokens, if a page had 4 (it has `PAGE_TOKENS`):

    tokens     0 1 2 3 | 4 5 . .      the last page has room for two more
    pages      7       | 2            numbers of pages need not be in order
    digests    digest  |              only full pages have digests
    inputs               4 5          the server keeps the inputs behind the last digest, for the next one
"""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.model.peft.block_adapters import BlockAdapter
from shoal.policy.batching.session_times import SessionTimes
from shoal.policy.batching.snapshots import keeps_snapshot, tokens_to_snapshot
from shoal.prefix import PAGE_TOKENS, page_hashes, root_hash
from shoal.server.kv.pages import PagePool, pages_for
from shoal.server.kv.states import SlotPool
from shoal.server.step_inputs import StepInputs
from shoal.spans import Span


@dataclass(frozen=True)
class Growth:
    """What the cache does before it takes a session's next tokens: what it copies, and what it clears.

    Copies are pairs of a source and a target.
    """

    copies: tuple[tuple[int, int], ...]
    new_pages: tuple[int, ...]
    slot_copies: tuple[tuple[int, int], ...] = ()
    new_slots: tuple[int, ...] = ()


class Row:
    """One sequence of a session: its pages, and the digests of the full ones, as far as they are known.

    A digest needs all inputs of its page, so the row keeps the inputs behind the last digest. `root` is the digest
    before the first page; `None` means that the row's pages get no more digests. `slot` has the row's states, if the
    body keeps states and the row has begun.
    """

    def __init__(self, root_hash: bytes | None, pages: Sequence[int] = (), digests: Sequence[bytes] = ()) -> None:
        self.pages = list(pages)
        self.slot: int | None = None
        self.digests = list(digests)
        self._root = root_hash
        self._inputs: list[tuple[torch.Tensor, torch.Tensor]] = []  # hidden states and positions behind the last digest
        self._num_inputs = 0  # their tokens

    def copy(self) -> Row:
        """A second sequence with the same beginning."""
        row = Row(self._root, self.pages, self.digests)
        row.slot = self.slot
        row._inputs, row._num_inputs = list(self._inputs), self._num_inputs
        return row

    def crop(self, num_tokens: int) -> list[int]:
        """Keep the first `num_tokens` tokens only. Returns the pages that the row gives up, for the caller to release.

        The end of the row is in one of three places:

            tokens     0 .......... 16 .......... 32 .......... 40
            digests    |   first    |   second    |
            inputs                                |  8 inputs   |

            from 32 on    the row keeps its digests, and the inputs up to its end
            at 16         the row keeps the first digest
            at 20         the inputs from 16 to 20 are gone already, so no page after the first gets a digest again
        """
        num_pages = pages_for(num_tokens)
        dropped: list[int] = []
        if num_pages < len(self.pages):
            dropped, self.pages = self.pages[num_pages:], self.pages[:num_pages]
        num_digested = len(self.digests) * PAGE_TOKENS
        if num_tokens >= num_digested:
            if num_tokens - num_digested < self._num_inputs:  # else nothing was taken back: the usual step
                self._inputs = _first(self._inputs, num_tokens - num_digested)
                self._num_inputs = num_tokens - num_digested
        else:
            self._inputs, self._num_inputs = [], 0
            if num_tokens % PAGE_TOKENS == 0:
                self.digests = self.digests[:num_pages]
            else:
                self.digests, self._root = self.digests[: num_pages - 1], None
        return dropped

    def append_inputs(self, hidden_TD: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Compute the digests of the pages that these inputs fill."""
        if self._root is None:
            return
        self._inputs.append((hidden_TD, positions_T))
        self._num_inputs += positions_T.shape[0]
        if self._num_inputs < PAGE_TOKENS:
            return
        hidden, positions = (torch.cat(parts) for parts in zip(*self._inputs, strict=True))
        digests = page_hashes(self.digests[-1] if self.digests else self._root, hidden, positions)
        self.digests += digests
        rest = len(digests) * PAGE_TOKENS
        self._num_inputs -= rest
        self._inputs = [(hidden[rest:].clone(), positions[rest:])] if self._num_inputs else []


class SessionCache:
    """The state of one session: a batch of sequences that take their steps together, `num_tokens` of each cached.

    It is a session of `peer`, and its pages and its time count for `payer`, which is the peer if it is `None`.
    Its keys and values are in pages of `pool`, and its states in `slots`, if the body keeps any. `opened` is how many
    sessions the server opened before. The engine keeps its `times`. `running` says whether the server has computed any
    of its tokens, or is computing them. `mask_BS` is `None` while no sequence has padding.
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
        slots: SlotPool | None = None,
        payer: str | None = None,
    ) -> None:
        self.span = span
        self.adapters = adapters or {}
        self.opened = opened
        self.peer = peer
        self.payer = peer if payer is None else payer
        self.times = SessionTimes()
        self.num_tokens = 0
        self.batch_size = batch_size
        self.rows: list[Row] = []
        self.mask_BS: torch.Tensor | None = None
        self.running = False
        self.preempted = False
        self._pool = pool
        self._slots = SlotPool(pool, 0) if slots is None else slots
        self._root = root_hash(span, salt)

    @property
    def pages(self) -> list[int]:
        """The pages that the session holds. A page that several rows share occurs once for each of them."""
        return [page for row in self.rows for page in row.pages]

    @property
    def state_pages(self) -> list[int]:
        """The pages that the session's states count as. Those of a slot that several rows share occur for each."""
        return self._slots.pages_of(row.slot for row in self.rows if row.slot is not None)

    @property
    def num_state_pages(self) -> int:
        """How many pages these are, each counted once."""
        return self._slots.pages_each * len({row.slot for row in self.rows} - {None})

    @property
    def has_states(self) -> bool:
        """Whether the body keeps states, which cannot go back."""
        return self._slots.pages_each > 0

    def adopt(self, digests: Sequence[Sequence[bytes]], *, max_pages: int) -> None:
        """Begin with the pages that have these digests, for each row. All rows begin with the same number of pages.

        If the body keeps states, these must be there too: for all rows, after the same number of pages.
        """
        found = [self._pool.find(each[:max_pages]) for each in digests]
        num_pages = min(len(pages) for pages in found)
        while self.has_states and num_pages and None in self._slots_after(num_pages, digests):
            num_pages -= 1
        self.rows = [
            Row(self._root, pages[:num_pages], each[:num_pages]) for pages, each in zip(found, digests, strict=True)
        ]
        self._pool.share(self.pages)
        if self.has_states and num_pages:
            for row, slot in zip(self.rows, self._slots_after(num_pages, digests), strict=True):
                assert slot is not None
                self._slots.share(slot)
                row.slot = slot
        self.num_tokens = num_pages * PAGE_TOKENS

    def _slots_after(self, num_pages: int, digests: Sequence[Sequence[bytes]]) -> list[int | None]:
        return [self._slots.find(each[num_pages - 1]) for each in digests]

    def begin_step(self, position: int, rows: Sequence[int] | None, inputs: StepInputs) -> None:
        """Go back to the `position` where a step starts. Row i then continues what was row `rows[i]`.

            tokens   0 ........ position ........ num_tokens (before)
                     |   kept     |    dropped      |
                     |   kept     |    inputs ............    (after the step)

        Without `rows` all rows stay in their order. At position 0 the session starts anew, with the inputs' batch size.
        """
        if position == 0:
            self.release()
            self.mask_BS = None
            self.rows = [Row(self._root) for _ in range(inputs.batch_size)]
        for row in self.rows:
            self._pool.release(row.crop(position))
        if rows is not None:
            before = self.rows
            self.rows = [before[index].copy() for index in rows]
            self._pool.share(self.pages)
            self._pool.release(page for row in before for page in row.pages)
            for slot in [row.slot for row in self.rows if row.slot is not None]:
                self._slots.share(slot)
            for slot in [row.slot for row in before if row.slot is not None]:
                self._slots.release(slot)
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

    def append_inputs(self, inputs: StepInputs) -> None:
        """Compute the digests of the pages that a step's inputs fill. Pages of padded sequences have none."""
        if self.mask_BS is not None or (self.has_states and not self._slots.with_snapshots):
            return
        positions_BT = inputs.positions_BT
        if positions_BT is None:
            positions_T = torch.arange(self.num_tokens, self.num_tokens + inputs.num_tokens)
            positions_BT = positions_T.expand(self.batch_size, -1)
        rows = self.rows
        if not rows:  # the session was preempted meanwhile
            return
        for row, hidden_TD, positions_T in zip(rows, inputs.hidden_BTD, positions_BT, strict=True):
            row.append_inputs(hidden_TD, positions_T)

    def pages_needed(self, num_tokens: int) -> int:
        """The most pages that `grow` allocates for `num_tokens` more tokens of every row."""
        pages = pages_for(self.num_tokens + num_tokens)
        return sum(
            pages - len(row.pages) + self._needs_copy(row) + self._slots.pages_each * self._needs_slot(row)
            for row in self.rows
        )

    def grow(self, num_tokens: int) -> Growth:
        """Allocate pages for `num_tokens` more tokens of every row. The caller makes sure that they are available."""
        self.running = True
        new_pages: list[int] = []
        copies: list[tuple[int, int]] = []
        new_slots: list[int] = []
        slot_copies: list[tuple[int, int]] = []
        for row in self.rows:
            if self._needs_slot(row):
                slot = self._slots.allocate()
                if row.slot is None:
                    new_slots.append(slot)
                else:
                    slot_copies.append((row.slot, slot))
                    self._slots.release(row.slot)
                row.slot = slot
            if self._needs_copy(row):
                (page,) = self._pool.allocate(1)
                copies.append((row.pages[-1], page))
                self._pool.release([row.pages[-1]])
                row.pages[-1] = page
            pages = self._pool.allocate(pages_for(self.num_tokens + num_tokens) - len(row.pages))
            row.pages += pages
            new_pages += pages
        return Growth(tuple(copies), tuple(new_pages), tuple(slot_copies), tuple(new_slots))

    def _needs_slot(self, row: Row) -> bool:
        """Whether the row's next token needs a slot for states: the row has none, or shares one with another row."""
        return self.has_states and (row.slot is None or self._slots.is_shared(row.slot))

    def _needs_copy(self, row: Row) -> bool:
        """Copy on write: whether the row's next token goes into a page that other sequences hold or can find."""
        has_room = self.num_tokens % PAGE_TOKENS > 0 and pages_for(self.num_tokens) == len(row.pages)
        return has_room and self._pool.is_shared(row.pages[-1])

    def record_computed(self, num_tokens: int) -> None:
        """The cache holds `num_tokens` more tokens of every row. Other sessions can find the pages that are full now.

        tokens   0 ....... num_tokens (before) ....... num_tokens (after)
        pages    | full_before |       newly full       | the last one, not full
        """
        full_before = self.num_tokens // PAGE_TOKENS
        self.num_tokens += num_tokens
        full = self.num_tokens // PAGE_TOKENS
        for row in self.rows:
            for page, digest in zip(row.pages[full_before:full], row.digests[full_before:full], strict=False):
                self._pool.register(page, digest)
        if self._keeps_snapshots:
            self._keep_snapshots(full)

    @property
    def _keeps_snapshots(self) -> bool:
        """Whether the states of this session may be kept for others: its rows have digests."""
        return self._slots.with_snapshots and self.mask_BS is None

    def _keep_snapshots(self, num_pages: int) -> None:
        """Let others find the states, if they end at a page's end and there is room for the copy to go on with."""
        room = {"num_pages": self._pool.num_pages, "num_available": self._pool.num_available}
        needed = len(self.rows) * self._slots.pages_each
        if keeps_snapshot(self.num_tokens, needed=needed, **room):
            for row in self.rows:
                if len(row.digests) >= num_pages and row.slot is not None:
                    self._slots.register(row.slot, row.digests[num_pages - 1])

    def drop_snapshots(self) -> None:
        """Hide the states from which this session goes on from others, so that it needs no copies of them."""
        for row in self.rows:
            if row.slot is not None:
                self._slots.unregister(row.slot)

    def tokens_in_one_chunk(self, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens to compute at once, so that the states can be kept between."""
        if not self._keeps_snapshots:
            return num_tokens
        return min(num_tokens, tokens_to_snapshot(self.num_tokens, self.num_tokens + num_tokens))

    def release(self) -> None:
        """Release all pages. May be called twice."""
        self._pool.release(self.pages)
        for slot in [row.slot for row in self.rows if row.slot is not None]:
            self._slots.release(slot)
        self.rows = []
        self.num_tokens = 0
        self.running = False

    def preempt(self) -> None:
        """Release all pages for another session. This one takes no more steps: its client opens another."""
        self.preempted = True
        self.release()


def _first(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pieces of the first `num_tokens` tokens, the last one cut."""
    first: list[tuple[torch.Tensor, torch.Tensor]] = []
    for hidden, positions in pieces:
        if num_tokens <= 0:
            break
        first.append((hidden[:num_tokens], positions[:num_tokens]))
        num_tokens -= len(positions)
    return first
