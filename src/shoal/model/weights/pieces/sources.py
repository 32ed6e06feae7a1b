"""Lists the pieces of a model that is on this machine, so that others can get them here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.errors import CheckpointError
from shoal.model.weights import disk_cache
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.fingerprint import file_digests
from shoal.model.weights.location import CONFIG
from shoal.model.weights.pieces.manifest import (
    MAX_OTHER_BYTES,
    PIECE_BYTES,
    ListedFile,
    Manifest,
    can_be_listed,
    may_be_listed,
)
from shoal.model.weights.pieces.peer_files import PeerFiles
from shoal.model.weights.pieces.piece_store import FolderPieces, PieceSource

_BESIDE_WEIGHTS = re.compile(
    r"(config|generation_config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab|merges|chat_template|tekken"
    r"|spiece|sentencepiece(\.bpe)?|(pre)?processor_config|model\.safetensors\.index)\.(json|txt|model|jinja)",
    re.ASCII,
)
"""The files beside the weights that Transformers knows. A folder's others are its owner's, and not passed on."""


def source_of(checkpoint: Checkpoint, *, check: Callable[[], None] = lambda: None) -> PieceSource | None:
    """The pieces of a checkpoint that this machine can give.

    None if some of its weights are not here, or if a manifest has no room for all of its files.

    All files are read once, which takes long; their digests are kept on the disk until they change. `check` is called
    now and then, and may raise. Raises `CheckpointError` or `OSError` for a file that cannot be read.
    """
    files = checkpoint.files
    if isinstance(files, PeerFiles):
        return files.store
    weights = checkpoint.weight_files
    if not all(files.has(file) for file in weights):
        return None
    others = [
        file
        for file in files.listing()
        if _BESIDE_WEIGHTS.fullmatch(file) and files.has(file) and files.path(file).stat().st_size <= MAX_OTHER_BYTES
    ]
    names = sorted({*weights, *others})
    if not all(map(may_be_listed, names)):
        return None
    paths = [files.path(name) for name in names]
    listed = tuple(
        ListedFile(name, path.stat().st_size, sha256)
        for name, path, sha256 in zip(names, paths, file_digests(paths), strict=True)
    )
    if not can_be_listed(listed):
        return None
    digests = tuple(digest for path in paths for digest in _piece_digests(path, check))
    return FolderPieces(Manifest(listed, digests), files.path(CONFIG).parent)


def _piece_digests(path: Path, check: Callable[[], None]) -> Sequence[bytes]:
    path = path.resolve()
    status = path.stat()
    key = f"sha256 of pieces of {PIECE_BYTES} bytes of {path}, {status.st_size} bytes, changed at {status.st_mtime_ns}"
    if (known := disk_cache.load(key)) is not None:
        return [bytes.fromhex(digest) for digest in known]
    digests = []
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            check()
            digests.append(hashlib.sha256(piece).digest())
    if len(digests) != -(-status.st_size // PIECE_BYTES):
        raise CheckpointError(f"{path} has changed while it was read")
    disk_cache.store(key, [digest.hex() for digest in digests])
    return digests
