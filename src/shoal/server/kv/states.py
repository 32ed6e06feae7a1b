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
    """Which sequences hold which slots. A slot counts as `pages_each` pages of the pool while it is held.

    So states and pages share one budget, and there is a slot for everyone who has the pages for it. Several sequences
    may share a slot until one of them computes on.
    """

    def __init__(self, pool: PagePool, pages_each: int) -> None:
        self.pages_each = pages_each
        self._pool = pool
        self._free = list(range(num_slots(pool.num_pages, pages_each)))
        self._num_holders: dict[int, int] = {}
        self._pages: dict[int, list[int]] = {}

    def allocate(self) -> int:
        """A slot with one holder. The caller makes sure that its pages are available."""
        pages = self._pool.allocate(self.pages_each)
        slot = heapq.heappop(self._free)
        self._num_holders[slot], self._pages[slot] = 1, pages
        return slot

    def share(self, slot: int) -> None:
        """Add a holder to a slot that is held."""
        self._num_holders[slot] += 1

    def release(self, slot: int) -> None:
        """Remove a holder of a slot."""
        self._num_holders[slot] -= 1
        if not self._num_holders[slot]:
            del self._num_holders[slot]
            self._pool.release(self._pages.pop(slot))
            heapq.heappush(self._free, slot)

    def is_shared(self, slot: int) -> bool:
        """Whether a slot that is held must not be written, because another sequence holds it too."""
        return self._num_holders[slot] > 1

    def pages_of(self, slots: Iterable[int]) -> list[int]:
        """The pages that these slots count as, each once."""
        return [page for slot in set(slots) for page in self._pages[slot]]


def num_slots(num_pages: int, pages_each: int) -> int:
    """How many slots there are beside so many pages, if each counts as `pages_each`. Without states there is none."""
    return num_pages // pages_each if pages_each else 0


class States:
    """The states of the sequences in `num_slots` slots. The system provides memory only for slots that were written."""

    def __init__(self, shapes: Mapping[StateName, TensorShape], num_slots: int, device: torch.device) -> None:
        self._tensors = {
            name: torch.empty((num_slots, *shape.sizes), dtype=shape.dtype, device=device)
            for name, shape in shapes.items()
        }

    def names_of(self, block: int) -> list[StateName]:
        """The states of a block."""
        return [name for name in self._tensors if name.block == block]

    def read(self, name: StateName, slots: Sequence[int]) -> Tensor:
        """A copy of a state of several sequences, [G, ...]."""
        tensor = self._tensors[name]
        start = slots[0]
        if list(slots) == list(range(start, start + len(slots))):
            return tensor[start : start + len(slots)].clone()
        return tensor[list(slots)]

    def write(self, name: StateName, slots: Sequence[int], values: Tensor) -> None:
        """Overwrite a state of several sequences."""
        tensor = self._tensors[name]
        start = slots[0]
        if list(slots) == list(range(start, start + len(slots))):
            tensor[start : start + len(slots)] = values
        else:
            tensor[list(slots)] = values

    def copy(self, source: int, target: int) -> None:
        """Overwrite one slot with another."""
        for tensor in self._tensors.values():
            tensor[target] = tensor[source]

    def clear(self, slots: Sequence[int]) -> None:
        """Fill slots with zeros."""
        for tensor in self._tensors.values():
            tensor[list(slots)] = 0
