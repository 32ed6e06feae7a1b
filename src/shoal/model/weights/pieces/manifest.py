"""The manifest: a model's files, cut into pieces, each with its digest.

A machine that has no copy of a model gets pieces from members of the swarm, and checks each against the manifest. The
manifest's own digest is its *name*, which an invite code vouches for. So whatever comes from a stranger is checked
before it is used or passed on.

The manifest lists the files that a checkpoint consists of: weights, config, tokenizer. Nothing that could be executed
is listed, and such a manifest is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shoal.errors import CheckpointError

PIECE_BYTES = 1 << 22
"""The size of a piece; the last one of each file may be smaller."""
MAX_FILES = 4096
MAX_PIECES = 1 << 18
"""A terabyte of weights."""
MAX_OTHER_BYTES = 1 << 26
"""The largest file beside the weights: room for any tokenizer. All of these are fetched before anything is read."""
MAX_MANIFEST_BYTES = 1 << 24
"""Room for the digests of `MAX_PIECES` pieces and the list of files."""
DIGEST_BYTES = 32
WEIGHTS = ".safetensors"
SUFFIXES = (WEIGHTS, ".json", ".txt", ".model", ".jinja")
"""The ends of the names of files that a checkpoint may consist of."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class ListedFile:
    """A file: its name, its size in bytes, and the SHA-256 of all of it, in hexadecimal."""

    name: str
    size: int
    sha256: str

    @property
    def num_pieces(self) -> int:
        """The pieces that it is cut into; an empty file has none."""
        return -(-self.size // PIECE_BYTES)


@dataclass(frozen=True)
class Place:
    """Where a piece is: its file, and the part of that file, in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Manifest:
    """Files in the order of their names, and the SHA-256 of each of their pieces, one file after another.

    Pieces are numbered through all files.
    """

    files: tuple[ListedFile, ...]
    digests: tuple[bytes, ...]

    @property
    def num_pieces(self) -> int:
        """The pieces of all files."""
        return len(self.digests)

    @property
    def others(self) -> tuple[str, ...]:
        """The files beside the weights: config, tokenizer and the like."""
        return tuple(each.name for each in self.files if not each.name.endswith(WEIGHTS))

    @cached_property
    def name(self) -> str:
        """The SHA-256 of the manifest, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def file(self, name: str) -> ListedFile | None:
        """A file by its name."""
        return self._by_name.get(name)

    def pieces(self, file: str, start: int = 0, end: int | None = None) -> range:
        """The pieces that hold the bytes `start` to `end` of a file; by default those of all of it."""
        index, listed = self._index[file], self._by_name[file]
        end = listed.size if end is None else min(end, listed.size)
        if end <= start:
            return range(0)
        first = self._first_pieces[index]
        return range(first + start // PIECE_BYTES, first + -(-end // PIECE_BYTES))

    def place(self, piece: int) -> Place:
        """Where a piece is."""
        index = bisect_right(self._first_pieces, piece) - 1
        listed = self.files[index]
        offset = (piece - self._first_pieces[index]) * PIECE_BYTES
        return Place(listed.name, offset, min(PIECE_BYTES, listed.size - offset))

    def is_piece(self, piece: int, content: bytes | bytearray | memoryview) -> bool:
        """Whether this is the content of a piece."""
        is_whole = 0 <= piece < self.num_pieces and len(content) == self.place(piece).length
        return is_whole and hashlib.sha256(content).digest() == self.digests[piece]

    def to_bytes(self) -> bytes:
        """The form that travels and that `name` is the digest of: a line of JSON, then the digests."""
        listed = [[each.name, each.size, each.sha256] for each in self.files]
        line = json.dumps({"piece_bytes": PIECE_BYTES, "files": listed}, separators=(",", ":"))
        return line.encode() + b"\n" + b"".join(self.digests)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Manifest:
        """The reverse of `to_bytes`. Raises `CheckpointError` for any bytes but those of the manifest `name`."""
        if len(data) > MAX_MANIFEST_BYTES or hashlib.sha256(data).hexdigest() != name:
            raise CheckpointError("this is not the manifest of the weights that were asked for")
        line, _, digests = data.partition(b"\n")
        try:
            files = tuple(ListedFile(*each) for each in json.loads(line)["files"])
            is_sound = can_be_listed(files)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_sound = False
        if is_sound and len(digests) == DIGEST_BYTES * sum(each.num_pieces for each in files):
            cut = tuple(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
            manifest = cls(files, cut)
            if manifest.to_bytes() == data:  # the same list in other words would have another name here
                return manifest
        raise CheckpointError(
            "the manifest of these weights lists what no checkpoint has",
            hint="it was made by another version of shoal, or by a hostile member",
        )

    @cached_property
    def _by_name(self) -> dict[str, ListedFile]:
        return {each.name: each for each in self.files}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {each.name: index for index, each in enumerate(self.files)}

    @cached_property
    def _first_pieces(self) -> list[int]:
        """The first piece of each file. An empty file has that of the next one, which `place` then finds."""
        firsts, count = [], 0
        for each in self.files:
            firsts.append(count)
            count += each.num_pieces
        return firsts


def may_be_listed(name: str) -> bool:
    """Whether a checkpoint may have a file of this name: a plain name, and no program."""
    return _FILE_NAME.fullmatch(name) is not None and name.endswith(SUFFIXES)


def can_be_listed(files: Sequence[ListedFile]) -> bool:
    """Whether a manifest may list these files: in order, each once, and no more than there is room for."""
    names = [each.name for each in files]
    return (
        0 < len(files) <= MAX_FILES
        and all(isinstance(each.name, str) and may_be_listed(each.name) for each in files)
        and names == sorted(set(names))
        and all(type(each.size) is int and each.size >= 0 for each in files)
        and all(each.size <= MAX_OTHER_BYTES or each.name.endswith(WEIGHTS) for each in files)
        and sum(each.num_pieces for each in files) <= MAX_PIECES
        and all(isinstance(each.sha256, str) and _SHA256.fullmatch(each.sha256) for each in files)
    )
