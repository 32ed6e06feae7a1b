"""Where a client keeps what it may have to send again: so much in memory, the rest in a file, in few bytes if wanted.

One store serves all sessions of a client. What is put into it is never changed, and needs no taking out: when nobody
holds a `StoredPiece` any more, its room is free. Sessions go in many ways (closed, forgotten, ended by an error), and
no bookkeeping of theirs could be forgotten that way.
"""

from __future__ import annotations

import collections
import itertools
import logging
import math
import threading
import weakref
from pathlib import Path

import torch

from shoal.client.history.spill_file import FileRegion, SpillFile
from shoal.errors import UserError
from shoal.net.wire import codec
from shoal.tensors import Encoding

log = logging.getLogger(__name__)


class StoredPiece:
    """A tensor in a store."""

    def __init__(self, store: HistoryStore, tensor: torch.Tensor, encoding: Encoding) -> None:
        self.shape = tensor.shape
        self.place: bytearray | FileRegion
        """Its bytes, or where in the file they are."""
        self._store = store
        self._spec, self.place = codec.pack_tensor(tensor, encoding)

    def get(self) -> torch.Tensor:
        """The tensor, as precise as it is kept. Not to be written to."""
        return codec.unpack_tensor(self._spec, self._store.read(self))


class HistoryStore:
    """Keeps tensors: the newest in memory, at most `memory_bytes` of them, the others in a file.

    Floating-point numbers are kept in `encoding`, whatever else as it is. Raises `UserError` if a file is needed and
    none can be made in `folder`. Any thread may use it.
    """

    def __init__(
        self, encoding: Encoding = "raw", *, memory_bytes: int | None = None, folder: Path | None = None
    ) -> None:
        if memory_bytes is not None and memory_bytes < 0:
            raise UserError(f"a history in {memory_bytes} bytes of memory: at least 0")
        if memory_bytes is None and folder is not None:
            raise UserError(
                "history_folder is for what does not fit into history_memory, which has no limit",
                hint="add history_memory=, in bytes",
            )
        self._encoding = encoding
        self._limit = math.inf if memory_bytes is None else memory_bytes
        self._file = None if memory_bytes is None else SpillFile(folder)
        self._memory_bytes = 0
        self._in_memory: dict[
            int, tuple[weakref.ref[StoredPiece], int]
        ] = {}  # the oldest first, and how many bytes each has
        self._in_file: dict[int, FileRegion] = {}
        self._keys = itertools.count()
        self._dropped = collections.deque[int]()  # garbage is collected anywhere, even while the lock is held
        self._file_is_full = False
        self._lock = threading.Lock()

    def put(self, tensor: torch.Tensor) -> StoredPiece:
        """Keep a copy of a tensor."""
        kept = StoredPiece(self, tensor, self._encoding)
        num_bytes = len(kept.place)
        with self._lock:
            self._sweep()
            key = next(self._keys)
            self._in_memory[key] = weakref.ref(kept), num_bytes
            self._memory_bytes += num_bytes
            weakref.finalize(kept, self._dropped.append, key).atexit = False
            self._spill()
        return kept

    def read(self, kept: StoredPiece) -> bytearray:
        """The bytes of what is kept."""
        with self._lock:
            if isinstance(kept.place, bytearray):
                return kept.place
            assert self._file is not None
            return self._file.read(kept.place)

    @property
    def memory_bytes(self) -> int:
        """How much memory it takes."""
        with self._lock:
            self._sweep()
            return self._memory_bytes

    @property
    def file_bytes(self) -> int:
        """How long its file is."""
        with self._lock:
            self._sweep()
            return 0 if self._file is None else self._file.num_bytes

    def _sweep(self) -> None:
        """Reckon with what was dropped."""
        while self._dropped:
            key = self._dropped.popleft()
            if (region := self._in_file.pop(key, None)) is not None:
                assert self._file is not None
                self._file.give_back(region)
            elif key in self._in_memory:
                self._memory_bytes -= self._in_memory.pop(key)[1]

    def _spill(self) -> None:
        """Move the oldest into the file, until the others are few enough.

        If that has no room left, memory must do: a sentence that goes on is worth more than the limit.
        """
        while self._file is not None and self._memory_bytes > self._limit:
            key, (reference, num_bytes) = next(iter(self._in_memory.items()))
            kept = reference()
            if kept is not None:
                assert isinstance(kept.place, bytearray)
                try:
                    kept.place = self._in_file[key] = self._file.write(kept.place)
                except OSError as error:
                    if not self._file_is_full:
                        log.warning("histories stay in memory, beyond the limit: %s", error)
                    self._file_is_full = True
                    return
                self._file_is_full = False
            del self._in_memory[key]
            self._memory_bytes -= num_bytes
