"""Remembers records that were opened, because one record is met several times: under each of its keys, and in reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from shoal.net.records import Announcement, unseal
from shoal.net.tallies import ShardTally, unseal_tally

MAX_OPENED_BYTES = 16 << 20
"""The memory of the records that are remembered: about 3,500 of the usual size."""
OPENED_BYTES, OPENED_FACTOR = 512, 6
"""What a remembered record takes: its own bytes and the objects made of them, as measured
(`benchmarks/directory/memory.py`)."""

Opened = TypeVar("Opened", Announcement, ShardTally)


class _Memory(Generic[Opened]):
    """Opens records of one kind. The latest that were valid are remembered, up to `max_bytes`."""

    def __init__(self, unseal_record: Callable[[bytes], Opened | None], max_bytes: int) -> None:
        self._unseal: Callable[[bytes], Opened | None] = unseal_record
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._opened: OrderedDict[bytes, Opened] = OrderedDict()

    def __call__(self, record: bytes) -> Opened | None:
        opened = self._opened.get(record)
        if opened is not None:
            self._opened.move_to_end(record)
            return opened
        opened = self._unseal(record)
        if opened is None:  # what is not valid is not remembered: it could be anything
            return None
        self._opened[record] = opened
        self._num_bytes += _size(record)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _size(self._opened.popitem(last=False)[0])
        return opened


def _size(record: bytes) -> int:
    return OPENED_BYTES + OPENED_FACTOR * len(record)


class OpenedRecords:
    """Opens records, with their signatures checked. `None` for those that are not valid."""

    def __init__(self, max_bytes: int = MAX_OPENED_BYTES) -> None:
        self.announcement = _Memory(unseal, max_bytes * 3 // 4)
        self.tally = _Memory(unseal_tally, max_bytes // 4)
