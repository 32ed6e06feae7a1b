"""The memory of recurrent and convolutional states: slots, each with all states of one sequence."""

# G sequences

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shoal.server.kv.cache_shapes import StateName, TensorShape
from shoal.server.kv.pages import PagePool


class SlotPool:
    """Which sequences hold which slots. A slot counts as `pages_each` pages of the pool.

    So states and pages share one budget, and there is a slot for every sequence that has the pages for it. Like a page,
    a slot may have a digest, that of the inputs up to the state. A sequence that begins with these inputs shares the
    slot, and copies it when it goes on. A slot without holders is kept until its pages are needed.
    """

    def __init__(self, pool: PagePool, pages_each: int, *, with_snapshots: bool = True) -> None:
        self.pages_each = pages_each
        self.with_snapshots = with_snapshots and pages_each > 0
        self._pool = pool
        self._free = list(range(num_slots(pool.num_pages, pages_each)))
        self._num_holders: dict[int, int] = {}
        self._pages: dict[int, list[int]] = {}
        self._digest_of: dict[int, bytes] = {}
        self._slot_of: dict[bytes, int] = {}

    def allocate(self) -> int:
        """A slot with one holder. The caller makes sure that its pages are available."""
        pages = self._pool.allocate(self.pages_each)
        if not self._free:
            self._collect()
        slot = heapq.heappop(self._free)
        self._num_holders[slot], self._pages[slot] = 1, pages
        return slot

    def share(self, slot: int) -> None:
        """Add a holder to a slot that is held, or that `find` has found."""
        self._pool.share(self._pages[slot])
        self._num_holders[slot] = self._num_holders.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """Remove a holder of a slot."""
        self._pool.release(self._pages[slot])
        self._num_holders[slot] -= 1
        if self._num_holders[slot]:
            return
        del self._num_holders[slot]
        if slot not in self._digest_of:
            self._free_slot(slot)

    def is_shared(self, slot: int) -> bool:
        """Whether a slot that is held must not be written: another sequence holds it too, or can find it."""
        return self._num_holders[slot] > 1 or slot in self._digest_of

    def register(self, slot: int, digest: bytes) -> None:
        """Give a slot that is held its digest. Of several slots with one digest, the first is found."""
        if slot not in self._digest_of and self.find(digest) is None:
            self._digest_of[slot], self._slot_of[digest] = digest, slot
            for page, name in zip(self._pages[slot], self._names(digest), strict=True):
                self._pool.register(page, name)

    def unregister(self, slot: int) -> None:
        """Take the digest of a slot away, so that its holder may write it, unless another sequence holds it too."""
        if self._num_holders[slot] == 1 and slot in self._digest_of:
            self._forget(slot)
            self._pool.unregister(self._pages[slot])

    def find(self, digest: bytes) -> int | None:
        """The slot with the states after these inputs."""
        slot = self._slot_of.get(digest)
        return slot if slot is not None and self._is_whole(slot) else None

    def pages_of(self, slots: Iterable[int]) -> list[int]:
        """The pages that these slots count as."""
        return [page for slot in slots for page in self._pages[slot]]

    def _names(self, digest: bytes) -> list[bytes]:
        """The digests of the pages of a slot."""
        return [digest + index.to_bytes(4, "big") for index in range(self.pages_each)]

    def _is_whole(self, slot: int) -> bool:
        """Whether the pool still has the pages of a slot. It evicts the last one first."""
        last = self.pages_each - 1
        return self._pool.find(self._names(self._digest_of[slot])[last:]) == self._pages[slot][last:]

    def _collect(self) -> None:
        """Free the slots without holders whose pages were given to others."""
        for slot in [slot for slot in self._digest_of if slot not in self._num_holders and not self._is_whole(slot)]:
            self._forget(slot)
            self._free_slot(slot)

    def _forget(self, slot: int) -> None:
        digest = self._digest_of.pop(slot)
        if self._slot_of.get(digest) == slot:
            del self._slot_of[digest]

    def _free_slot(self, slot: int) -> None:
        del self._pages[slot]
        heapq.heappush(self._free, slot)


def num_slots(num_pages: int, pages_each: int) -> int:
    """How many slots go with `num_pages` pages, if each counts as `pages_each`. Without states there is none."""
    return num_pages // pages_each if pages_each else 0


class States:
    """The states of the sequences in `num_slots` slots. The system provides memory only for slots that were written."""

    def __init__(self, shapes: Mapping[StateName, TensorShape], num_slots: int, device: torch.device) -> None:
        self._tensors = {
            name: torch.empty((num_slots, *shape.sizes), dtype=shape.dtype, device=device)
            for name, shape in shapes.items()
        }

    def read(self, name: StateName, slots: Sequence[int]) -> Tensor:
        """A copy of a state of several sequences, [G, ...]."""
        tensor = self._tensors[name]
        return tensor.index_select(0, torch.tensor(slots, device=tensor.device))

    def write(self, name: StateName, slots: Sequence[int], values: Tensor) -> None:
        """Overwrite a state of several sequences."""
        tensor = self._tensors[name]
        start = slots[0]
        if list(slots) == list(range(start, start + len(slots))):  # twice as fast
            tensor[start : start + len(slots)] = values
        else:
            tensor.index_copy_(0, torch.tensor(slots, device=tensor.device), values)

    def copy(self, source: int, target: int) -> None:
        """Overwrite one slot with another."""
        for tensor in self._tensors.values():
            tensor[target] = tensor[source]

    def clear(self, slots: Sequence[int]) -> None:
        """Fill slots with zeros."""
        for tensor in self._tensors.values():
            tensor[list(slots)] = 0
