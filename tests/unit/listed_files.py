"""Manifests of files that a test makes up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from shoal.model.weights.pieces.manifest import PIECE_BYTES, ListedFile, Manifest


def cut(content: bytes) -> list[bytes]:
    return [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]


def manifest_of(files: Mapping[str, bytes]) -> Manifest:
    return Manifest(
        tuple(ListedFile(name, len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in sorted(files)),
        tuple(hashlib.sha256(piece).digest() for name in sorted(files) for piece in cut(files[name])),
    )
