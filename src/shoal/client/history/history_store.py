"""The store of a client's histories: a limited number of bytes in memory, the rest in a file, encoded if wanted.

One store serves all sessions of a client. A piece in it never changes. Its bytes are freed when the last reference to
its `StoredPiece` is gone, because sessions end in many ways (closed, forgotten, by an error) and none of them then has
to remember to free anything.
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

from shoal.client.history.remembered_pages import RememberedPages
from shoal.client.history.sent_beginnings import SentBeginnings
from shoal.client.history.spill_file import FileRegion, SpillFile
from shoal.errors import UserError
from shoal.net.wire import codec
from shoal.tensors import Encoding

log = logging.getLogger(__name__)


class StoredPiece:
    """A tensor in a store. The store keeps its bytes as long as this object lives."""

    def __init__(self, store: HistoryStore, tensor: torch.Tensor, encoding: Encoding) -> None:
        self.shape = tensor.shape
        self.place: bytearray | FileRegion
        """The bytes, or where in the file they are."""
        self._store = store
        self._spec, self.place = codec.pack_tensor(tensor, encoding)

    def get(self) -> torch.Tensor:
        """The tensor, as precise as the store's encoding. The caller must not write to it."""
        return codec.unpack_tensor(self._spec, self._store.read(self))


class HistoryStore:
    """Keeps tensors: the newest in memory, up to `memory_bytes` in all, and the older ones in a file.

    Floating-point tensors are kept in `encoding`, other tensors exactly. The file is in `folder`, by default in the
    system's folder for temporary files; there is none if `memory_bytes` is None, which is no limit. Raises `UserError`
    if the file cannot be made. Any thread may use the store.
    """

    def __init__(
        self, encoding: Encoding = "raw", *, memory_bytes: int | None = None, folder: Path | None = None
    ) -> None:
        if memory_bytes is not None and memory_bytes < 0:
            raise UserError(f"history_memory is {memory_bytes} bytes: it has to be at least 0")
        if memory_bytes is None and folder is not None:
            raise UserError(
                "history_folder is for histories that do not fit into history_memory, which has no limit",
                hint="add history_memory=, in bytes",
            )
        self.beginnings = SentBeginnings()
        """How the texts of all sessions began."""
        self.pages = RememberedPages()
        """What followed from them inside of rings."""
        self._encoding = encoding
        self._limit = math.inf if memory_bytes is None else memory_bytes
        self._file = None if memory_bytes is None else SpillFile(folder)
        self._memory_bytes = 0
        self._in_memory: dict[int, tuple[weakref.ref[StoredPiece], int]] = {}
        """The pieces in memory and their sizes in bytes, the oldest first."""
        self._in_file: dict[int, FileRegion] = {}
        self._keys = itertools.count()
        self._dropped = collections.deque[int]()
        """The keys of pieces that were freed. The garbage collector may add one while the lock is held."""
        self._file_is_full = False
        self._lock = threading.Lock()

    def put(self, tensor: torch.Tensor) -> StoredPiece:
        """Keep a copy of a tensor."""
        piece = StoredPiece(self, tensor, self._encoding)
        num_bytes = len(piece.place)
        with self._lock:
            self._sweep()
            key = next(self._keys)
            self._in_memory[key] = weakref.ref(piece), num_bytes
            self._memory_bytes += num_bytes
            weakref.finalize(piece, self._dropped.append, key).atexit = False
            self._spill()
        return piece

    def read(self, piece: StoredPiece) -> bytearray:
        """The bytes of a piece."""
        with self._lock:
            if isinstance(piece.place, bytearray):
                return piece.place
            assert self._file is not None
            return self._file.read(piece.place)

    @property
    def memory_bytes(self) -> int:
        """How many bytes the pieces in memory take."""
        with self._lock:
            self._sweep()
            return self._memory_bytes

    @property
    def file_bytes(self) -> int:
        """The length of the file in bytes."""
        with self._lock:
            self._sweep()
            return 0 if self._file is None else self._file.num_bytes

    def _sweep(self) -> None:
        """Free the bytes of the pieces that were dropped."""
        while self._dropped:
            key = self._dropped.popleft()
            if (region := self._in_file.pop(key, None)) is not None:
                assert self._file is not None
                self._file.free(region)
            elif key in self._in_memory:
                self._memory_bytes -= self._in_memory.pop(key)[1]

    def _spill(self) -> None:
        """Move the oldest pieces into the file until the others are within the limit.

        If the disk is full, they stay in memory: it is better to exceed the limit than to end a generation.
        """
        while self._file is not None and self._memory_bytes > self._limit:
            key, (reference, num_bytes) = next(iter(self._in_memory.items()))
            piece = reference()
            if piece is not None:
                assert isinstance(piece.place, bytearray)
                try:
                    piece.place = self._in_file[key] = self._file.write(piece.place)
                except OSError as error:
                    if not self._file_is_full:
                        log.warning("histories stay in memory, beyond the limit: %s", error)
                    self._file_is_full = True
                    return
                self._file_is_full = False
            del self._in_memory[key]
            self._memory_bytes -= num_bytes
