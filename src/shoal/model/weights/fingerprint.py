"""Which model this is, and exactly which weights.

The *key* says what is computed: two copies of a model, or two revisions of it, have one key and meet in one swarm. The
*fingerprint* says with which numbers: servers whose fingerprints differ are never in one route. Both are the same for a
model on the hub and for a local copy of its files, and cost the hub no download. Quantization happens on loading and
changes neither.

A fingerprint covers the whole checkpoint, file by file, because the hub publishes the digest of every file and of no
tensor. Hence a copy that was saved anew with other shard sizes counts as another model, and a folder with only some of
the shards has no fingerprint.
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

from shoal.model.weights import disk_cache as memo

_CHUNK = 1 << 23
_PROGRESS_AFTER_SECONDS = 1.0

# Where it came from, what else it was trained or saved for, how to sample from it: copies may differ in all of these.
_SAYS_NOTHING_OF_THE_COMPUTATION = re.compile(
    r"_name_or_path|_commit_hash|transformers_version|architectures|auto_map|(torch_)?dtype|use_cache"
    r"|_?attn_implementation.*|id2label|label2id|num_labels|problem_type|task_specific_params|\w+_token_ids?"
    r"|max_length|min_length|do_sample|num_beams|temperature|top_k|top_p|repetition_penalty|no_repeat_ngram_size"
)


def model_key(config: Mapping[str, Any], *, num_blocks: int, hidden_size: int) -> str:
    """The swarm's name for a model, such as `llama-16x2048-1a2b3c4d`.

    Taken from `config.json` as it is written, not as Transformers reads it: peers with other versions of Transformers,
    which add fields and change their defaults, must find the same key.
    """
    text = json.dumps(_computation(config), sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{config.get('model_type', 'model')}-{num_blocks}x{hidden_size}-{digest[:8]}"


def fingerprint(key: str, digests: Iterable[str]) -> str:
    """The name of exact weights, given the SHA-256 digests of all files that hold them, in any order."""
    return hashlib.sha256("\n".join([key, *sorted(digests)]).encode()).hexdigest()[:32]


def file_digests(paths: Sequence[Path]) -> list[str]:
    """The SHA-256 digests of these files, in hexadecimal.

    A digest is kept until the file's size or time of change does. In the hub's cache a file is a link to a blob that is
    named by its digest, and is not read.
    """
    names = {path: _blob_name(path) or memo.recall(_fact(path)) for path in paths}
    unknown = [path for path, digest in names.items() if digest is None]
    if unknown:
        with _SlowProgress(
            "Fingerprinting the weights", total=sum(path.stat().st_size for path in unknown)
        ) as progress:
            for path in unknown:
                fact = _fact(path)  # before reading: a file that changes meanwhile is read again next time
                names[path] = _sha256(path, progress)
                memo.keep(fact, names[path])
    return [str(names[path]) for path in paths]


def _computation(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _computation(inner)
            for name, inner in value.items()
            if inner is not None and not _SAYS_NOTHING_OF_THE_COMPUTATION.fullmatch(name)
        }
    return [_computation(inner) for inner in value] if isinstance(value, list) else value


def _blob_name(path: Path) -> str | None:
    if not path.is_symlink():
        return None
    blob = path.readlink()
    is_digest = len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef")
    return blob.name if is_digest and blob.parent.name == "blobs" else None


def _fact(path: Path) -> str:
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
    """A progress bar on stderr that appears only if the work takes longer than a second."""

    def __init__(self, what: str, *, total: int) -> None:
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
        self._task = self._bar.add_task(what, total=total)
        self._appears_at = time.monotonic() + _PROGRESS_AFTER_SECONDS

    def __enter__(self) -> _SlowProgress:
        return self

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)
        if not self._bar.live.is_started and time.monotonic() >= self._appears_at:
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
