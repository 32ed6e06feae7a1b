"""Facts that never change, kept on disk: the digest of a file, what a commit holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where shoal keeps what it can find out again: `SHOAL_CACHE`, or `shoal` in the user's cache folder."""
    if folder := os.environ.get("SHOAL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal"


def recall(fact: str) -> Any | None:
    """What was kept under this name, or `None`; a damaged entry counts as forgotten."""
    try:
        kept = json.loads(_file(fact).read_bytes())
    except (OSError, ValueError):
        return None
    return kept["value"] if isinstance(kept, dict) and kept.get("fact") == fact else None


def keep(fact: str, value: Any) -> None:
    """Keep a JSON value under this name; where nothing can be written, it is simply found out again next time."""
    file = _file(fact)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        # One file a fact, and renamed into place: processes that start together cannot lose each other's facts.
        handle, draft = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as out:
            json.dump({"fact": fact, "value": value}, out)
        os.replace(draft, file)


def forget(fact: str) -> None:
    """It was no fact."""
    with contextlib.suppress(OSError):
        _file(fact).unlink(missing_ok=True)


def remembered(fact: str, find_out: Callable[[], Any]) -> Any:
    """The value kept under this name, found out now if it is not known yet."""
    value = recall(fact)
    if value is None:
        value = find_out()
        keep(fact, value)
    return value


def _file(fact: str) -> Path:
    return cache_folder() / "facts" / f"{hashlib.sha256(fact.encode()).hexdigest()[:32]}.json"
