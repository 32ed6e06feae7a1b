"""A model's files as they come from members of the swarm, piece by piece, when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from shoal.errors import CheckpointError
from shoal.model.weights.manifest import ListedFile
from shoal.model.weights.piece_store import PieceStore
from shoal.model.weights.safetensors_file import Header, header_bytes, read_all, read_header


class Fetch(Protocol):
    """Gets pieces that are missing into the store."""

    def __call__(self, pieces: Sequence[int]) -> None:
        """Returns when the store has these pieces: it may take long. Raises `CheckpointError` if no member has them."""

    def stop(self) -> None:
        """Let no caller wait any longer: each gets a `CheckpointError`."""


class PeerFiles:
    """`shoal.model.weights.files.Files` that come from members of the swarm. What has come stays on the disk."""

    def __init__(self, store: PieceStore, fetch: Fetch, *, name: str) -> None:
        self._store = store
        self._fetch = fetch
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def store(self) -> PieceStore:
        """What has come, to pass it on."""
        return self._store

    def stop(self) -> None:
        """Fetch nothing more, and let no thread wait for what is fetched now."""
        self._fetch.stop()

    @property
    def origin(self) -> str:
        return str(self._store.folder)

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and self._store.manifest.file(file) is not None

    def listing(self) -> Iterable[str]:
        return [each.name for each in self._store.manifest.files]

    def has(self, file: str) -> bool:
        return file in self and not self._store.missing(self._store.manifest.pieces(file))

    def path(self, file: str) -> Path:
        self._listed(file)
        self._get(self._store.manifest.pieces(file))
        return self._store.folder / file

    def headers(self, files: Sequence[str]) -> dict[str, Header]:
        self._get(piece for file in files for piece in self._first_pieces(file))
        return {file: self._header(file)[0] for file in files}

    def digests(self, files: Sequence[str]) -> list[str]:
        return [self._listed(file).sha256 for file in files]

    def known_digests(self, files: Sequence[str]) -> list[str]:
        return self.digests(files)

    def has_tensors(self, file: str, names: Iterable[str]) -> bool:
        return file in self and self._has_header(file) and not self._store.missing(self._pieces_of(file, names))

    def tensors(self, names_in: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        self._get(piece for file in names_in for piece in self._first_pieces(file))
        self._get(piece for file, names in names_in.items() for piece in self._pieces_of(file, names))
        return read_all({self._store.folder / file: names for file, names in names_in.items()})

    def _listed(self, file: str) -> ListedFile:
        listed = self._store.manifest.file(file)
        if listed is None:
            raise CheckpointError(f"{self._name} has no file {file}", hint="the member that began the swarm lacks it")
        return listed

    def _has_header(self, file: str) -> bool:
        manifest, path = self._store.manifest, self._store.folder / file
        if self._store.missing(manifest.pieces(file, 0, 8)):
            return False
        return not self._store.missing(manifest.pieces(file, 0, header_bytes(path)))

    def _first_pieces(self, file: str) -> range:
        """The pieces that tell how long the header is."""
        self._listed(file)
        return self._store.manifest.pieces(file, 0, 8)

    def _header(self, file: str) -> tuple[Header, int]:
        """The header of a file, and where the tensors begin."""
        manifest, path = self._store.manifest, self._store.folder / file
        self._get(self._first_pieces(file))
        start = header_bytes(path)
        self._get(manifest.pieces(file, 0, start))
        return read_header(path), start

    def _pieces_of(self, file: str, names: Iterable[str]) -> list[int]:
        """The pieces with the header and these tensors. A tensor that the header lacks is left to the reader."""
        header, start = self._header(file)
        pieces = set(self._store.manifest.pieces(file, 0, start))
        for name in names:
            if name in header:
                end = start + header[name].end
                pieces.update(self._store.manifest.pieces(file, end - header[name].nbytes, end))
        return sorted(pieces)

    def _get(self, pieces: Iterable[int]) -> None:
        if missing := self._store.missing(pieces):
            try:
                self._fetch(missing)
            finally:
                self._store.save()  # what has come is kept, even if more was wanted
