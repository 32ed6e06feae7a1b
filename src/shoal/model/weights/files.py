"""The files of a checkpoint: in a local folder, on the hub (`shoal.model.weights.hub`), or with members of the swarm
(`shoal.model.weights.peer_files`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shoal.errors import CheckpointError
from shoal.model.weights.fingerprint import file_digests, known_digest
from shoal.model.weights.safetensors_file import Header, read_all, read_header

if TYPE_CHECKING:
    from torch import Tensor


class Files(Protocol):
    """The files of a checkpoint. Only `path`, `tensors`, and `digests` of small files, download anything."""

    @property
    def name(self) -> str:
        """A short name to show."""

    @property
    def origin(self) -> str:
        """The name by which Transformers finds them: the folder, or the id on the hub."""

    def __contains__(self, file: object) -> bool: ...

    def listing(self) -> Iterable[str]:
        """The names of all files."""

    def has(self, file: str) -> bool:
        """Whether a file is on this machine, so that `path` does not download it."""

    def path(self, file: str) -> Path:
        """The path of a file on this machine. Raises `CheckpointError` if the checkpoint has no such file."""

    def headers(self, files: Sequence[str]) -> dict[str, Header]:
        """The headers of these safetensors files."""

    def digests(self, files: Sequence[str]) -> list[str]:
        """The SHA-256 digests of these files, in hexadecimal."""

    def known_digests(self, files: Sequence[str]) -> list[str] | None:
        """The same, if they are known without reading the files; else None."""

    def has_tensors(self, file: str, names: Iterable[str]) -> bool:
        """Whether these tensors of a safetensors file are on this machine, so that `tensors` does not download them."""

    def tensors(self, names_in: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """These tensors of each safetensors file, mapped into memory (`shoal.model.weights.safetensors_file`)."""


@dataclass(frozen=True)
class LocalFiles:
    """The files of a folder."""

    folder: Path
    name: str

    @property
    def origin(self) -> str:
        return str(self.folder)

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and (self.folder / file).is_file()

    def listing(self) -> Iterable[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def has(self, file: str) -> bool:
        return file in self

    def path(self, file: str) -> Path:
        if file not in self:
            raise CheckpointError(
                f"{self.folder} has no file {file}",
                hint="copy it there, or name the model by its id on the hub to download only the needed files",
            )
        return self.folder / file

    def headers(self, files: Sequence[str]) -> dict[str, Header]:
        return {file: read_header(self.path(file)) for file in files}

    def digests(self, files: Sequence[str]) -> list[str]:
        return file_digests([self.path(file) for file in files])

    def known_digests(self, files: Sequence[str]) -> list[str] | None:
        return all_known(known_digest(self.path(file)) for file in files)

    def has_tensors(self, file: str, names: Iterable[str]) -> bool:
        return self.has(file)

    def tensors(self, names_in: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        return read_all({self.path(file): names for file, names in names_in.items()})


def all_known(digests: Iterable[str | None]) -> list[str] | None:
    """These digests, or None if one of them is None."""
    found = list(digests)
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else None
