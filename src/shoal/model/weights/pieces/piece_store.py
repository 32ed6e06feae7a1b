"""Pieces of a model's files on this machine: in a folder with a copy, or in shoal's cache, as far as they have come."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from shoal.errors import CheckpointError, UserError
from shoal.host.whole_files import replacing
from shoal.model.weights.pieces.manifest import Manifest

_HELD = "held"
_EPOCH_BYTES = 16


class PieceSource(Protocol):
    """Pieces that this machine can pass on."""

    manifest: Manifest

    def holds(self, piece: int) -> bool:
        """Whether it has a piece."""

    def held(self) -> bytes:
        """A bit for each piece, the lowest of a byte first."""

    def read(self, piece: int) -> bytes:
        """A piece that it has, checked. Raises `CheckpointError` if the file has changed."""


class FolderPieces:
    """A folder that has all files of a manifest."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder

    def holds(self, piece: int) -> bool:
        return 0 <= piece < self.manifest.num_pieces

    def held(self) -> bytes:
        num_pieces = self.manifest.num_pieces
        return ((1 << num_pieces) - 1).to_bytes(-(-num_pieces // 8), "little")

    def read(self, piece: int) -> bytes:
        return _read(self.manifest, self.folder, piece)


class PieceStore:
    """A folder of files that have come in part. A file has its full size from the beginning, with holes.

    It remembers which pieces have come, also after a crash: a piece counts when its bytes are on the disk. Several
    threads may use it. Several processes may too: they write the same bytes.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self._folder = folder
        self._lock = threading.Lock()
        self._saving = threading.Lock()  # one save at a time: the older must not replace the newer
        self._dirty: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = [each.name for each in manifest.files if self._make_file(each.name, each.size)]
            self._held, self._epoch = self._saved()
            self._forget(made)
        except OSError as failure:
            raise _unwritable(folder, failure) from None

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    def holds(self, piece: int) -> bool:
        if not 0 <= piece < self.manifest.num_pieces:
            return False
        return bool(self._held[piece // 8] >> piece % 8 & 1)

    def held(self) -> bytes:
        return bytes(self._held)

    def missing(self, pieces: Iterable[int]) -> list[int]:
        """Those of these pieces that have not come."""
        return [piece for piece in pieces if not self.holds(piece)]

    def read(self, piece: int) -> bytes:
        return _read(self.manifest, self._folder, piece)

    def put(self, piece: int, content: bytes | bytearray | memoryview) -> bool:
        """Store a piece. Returns False, and stores nothing, if the content is not that of the piece.

        It counts for other processes, and after a crash, when `save` has been called. Raises `UserError` if it cannot
        be written.
        """
        if not self.manifest.is_piece(piece, content):
            return False
        place = self.manifest.place(piece)
        try:
            with (self._folder / place.file).open("r+b") as file:
                file.seek(place.offset)
                file.write(content)
        except OSError as failure:
            raise _unwritable(self._folder, failure) from None
        with self._lock:
            self._held[piece // 8] |= 1 << piece % 8
            self._dirty.add(place.file)
        return True

    def save(self) -> None:
        """Make what has come last. Raises `UserError` if the disk does not take it."""
        with self._saving:
            dirty: set[str] = set()
            try:
                saved, epoch = self._saved()
                with self._lock:
                    if epoch != self._epoch:  # another process has made files anew since: what had come may be gone
                        self._held, self._epoch, self._dirty = saved, epoch, set()
                    held, dirty = bytearray(self._held), self._dirty
                    self._dirty = set()
                for name in dirty:
                    with (self._folder / name).open("r+b") as file:
                        os.fsync(file.fileno())
                self._write(bytes(mine | theirs for mine, theirs in zip(held, saved, strict=True)))
            except OSError as failure:
                with self._lock:
                    self._dirty |= dirty
                raise _unwritable(self._folder, failure) from None

    def _make_file(self, name: str, size: int) -> bool:
        """Give a file its size. Returns whether it had another one, or was not there."""
        path = self._folder / name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == size:
                return False
        with path.open("ab") as file:
            file.truncate(size)
        return True

    def _forget(self, files: Iterable[str]) -> None:
        """Pieces do not count that had come into files which were deleted or cut since.

        Other processes that use the store learn it from a new epoch: they must not count these pieces again.
        """
        lost = [piece for file in files for piece in self.manifest.pieces(file) if self.holds(piece)]
        for piece in lost:
            self._held[piece // 8] &= ~(1 << piece % 8)
        if lost:
            self._epoch = secrets.token_bytes(_EPOCH_BYTES)
            self._write(self._held)

    def _write(self, held: bytes | bytearray) -> None:
        with replacing(self._folder / _HELD) as draft:
            draft.write_bytes(held + self._epoch)

    def _saved(self) -> tuple[bytearray, bytes]:
        """The pieces that are there, and the epoch of this list."""
        size = -(-self.manifest.num_pieces // 8)
        try:
            held = (self._folder / _HELD).read_bytes()
        except FileNotFoundError:
            held = b""
        if len(held) != size + _EPOCH_BYTES:
            return bytearray(size), bytes(_EPOCH_BYTES)
        return bytearray(held[:size]), held[size:]


def _read(manifest: Manifest, folder: Path, piece: int) -> bytes:
    place = manifest.place(piece)
    try:
        with (folder / place.file).open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
    except OSError as failure:
        raise CheckpointError(f"cannot read {folder / place.file}: {failure.strerror}") from None
    if not manifest.is_piece(piece, content):
        raise CheckpointError(f"{folder / place.file} has changed since it was looked at", hint="restart the server")
    return content


def _unwritable(folder: Path, failure: OSError) -> UserError:
    return UserError(
        f"cannot write {folder}: {failure.strerror}",
        hint="make room there, or choose another place with SHOAL_CACHE; what has come is kept",
    )
