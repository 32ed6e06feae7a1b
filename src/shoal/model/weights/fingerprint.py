"""The identity of a model and of its exact weights.

The *key* identifies the computation: copies and revisions of a model have the same key and meet in one swarm. The
*fingerprint* identifies the weights: servers with different fingerprints are never in one route. Both are equal for a
model on the hub and for a local copy of its files, and neither needs a download from the hub. Quantization happens at
loading and changes neither.

A fingerprint covers the checkpoint file by file, because the hub publishes digests of files and not of tensors.
Therefore a copy that was saved again with other shard sizes has another fingerprint, and a folder with only some of the
shards has none.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.model.weights import disk_cache
from shoal.progress_log import ByteLines

_CHUNK = 1 << 23
_PROGRESS_AFTER_SECONDS = 1.0

# Fields of config.json that do not affect the computation of hidden states and logits. Copies may differ in them.
_NOT_IN_KEY = re.compile(
    r"_name_or_path|_commit_hash|transformers_version|architectures|auto_map|(torch_)?dtype|use_cache"
    r"|_?attn_implementation.*|id2label|label2id|num_labels|problem_type|task_specific_params|\w+_token_ids?"
    r"|max_length|min_length|do_sample|num_beams|temperature|top_k|top_p|repetition_penalty|no_repeat_ngram_size"
)


def model_key(config: Mapping[str, Any], *, num_blocks: int, hidden_size: int) -> str:
    """The swarm's name for a model, such as `llama-16x2048-1a2b3c4d`.

    It is computed from the text of `config.json`. What Transformers reads from it depends on the version, which may add
    fields and change defaults, and peers with different versions must compute the same key.
    """
    text = json.dumps(_computation(config), sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{config.get('model_type', 'model')}-{num_blocks}x{hidden_size}-{digest[:8]}"


def fingerprint(key: str, digests: Iterable[str]) -> str:
    """The name of exact weights, from the SHA-256 digests of all their files in any order."""
    return hashlib.sha256("\n".join([key, *sorted(digests)]).encode()).hexdigest()[:32]


def file_digests(paths: Sequence[Path]) -> list[str]:
    """The SHA-256 digests of these files, in hexadecimal.

    A digest is cached until the size or the modification time of the file changes. In the hub's cache a file is a link
    to a blob whose name is the digest, so the file is not read.
    """
    digests = {path: _blob_name(path) or disk_cache.load(_cache_key(path)) for path in paths}
    unknown = [path for path, digest in digests.items() if digest is None]
    if unknown:
        with _SlowProgress(
            "Fingerprinting the weights", total=sum(path.stat().st_size for path in unknown)
        ) as progress:
            for path in unknown:
                key = _cache_key(path)  # before reading, so that a file that changes meanwhile is read again next time
                digests[path] = _sha256(path, progress)
                disk_cache.store(key, digests[path])
    return [str(digests[path]) for path in paths]


def known_digest(path: Path) -> str | None:
    """The SHA-256 digest of a file, if it is known without reading the file (`file_digests`)."""
    try:
        digest = _blob_name(path) or disk_cache.load(_cache_key(path))
    except OSError:
        return None
    return digest if isinstance(digest, str) else None


def _computation(value: Any) -> Any:
    """The part of a config that affects the computation."""
    if isinstance(value, Mapping):
        return {
            name: _computation(inner)
            for name, inner in value.items()
            if inner is not None and not _NOT_IN_KEY.fullmatch(name)
        }
    return [_computation(inner) for inner in value] if isinstance(value, list) else value


def _blob_name(path: Path) -> str | None:
    """The digest of a file in the hub's cache, from its link; None for other files."""
    if not path.is_symlink():
        return None
    blob = path.readlink()
    is_digest = len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef")
    return blob.name if is_digest and blob.parent.name == "blobs" else None


def _cache_key(path: Path) -> str:
    path = path.resolve()
    status = path.stat()
    return f"sha256 of {path}, {status.st_size} bytes, changed at {status.st_mtime_ns}"


def _sha256(path: Path, progress: _SlowProgress) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()


class _SlowProgress:
    """A progress bar on stderr that appears if the work takes longer than a second; lines in the log elsewhere."""

    def __init__(self, description: str, *, total: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total)
        self._lines = ByteLines(description, total=total)
        self._appears_at = time.monotonic() + _PROGRESS_AFTER_SECONDS

    def __enter__(self) -> _SlowProgress:
        return self

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)
        self._lines.advance(num_bytes)
        if not self._bar.live.is_started and time.monotonic() >= self._appears_at:
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
