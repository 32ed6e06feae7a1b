"""A cache on disk for JSON values that can be computed again, such as the digest of a file or the files of a commit.

Each value has a text key that says what it is, including everything that it depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.host.whole_files import replacing


def cache_folder() -> Path:
    """The folder for everything that shoal can compute again: `SHOAL_CACHE`, or `shoal` in the user's cache folder."""
    if folder := os.environ.get("SHOAL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal"


def load(key: str) -> Any | None:
    """The value stored under this key; None if there is none or its file is damaged."""
    try:
        entry = json.loads(_file(key).read_bytes())
    except (OSError, ValueError):
        return None
    return entry["value"] if isinstance(entry, dict) and entry.get("fact") == key else None


def store(key: str, value: Any) -> None:
    """Store a JSON value under this key. If the disk cannot be written, the value is computed again next time."""
    file = _file(key)
    with contextlib.suppress(OSError), replacing(file) as draft:  # a file each: processes lose none of each other's
        draft.write_text(json.dumps({"fact": key, "value": value}))


def remove(key: str) -> None:
    """Remove the value stored under this key, if there is one."""
    with contextlib.suppress(OSError):
        _file(key).unlink(missing_ok=True)


def load_or_compute(key: str, compute: Callable[[], Any]) -> Any:
    """The value stored under this key, or that of `compute`, which is then stored."""
    value = load(key)
    if value is None:
        value = compute()
        store(key, value)
    return value


def _file(key: str) -> Path:
    return cache_folder() / "facts" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
