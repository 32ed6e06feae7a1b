"""Which key a server of this machine is known by, from one start to the next.

A server that comes back is the same peer if it has the same key. Two that run at once must not: others would take them
for one. So keys are kept in numbered slots, `~/.cache/shoal/identities/serve-0` and on, and a process takes the first
one that no other process holds. It holds it by a lock on the file next to it, which the system releases however the
process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import UserError
from shoal.model.weights.disk_cache import cache_folder


@contextlib.contextmanager
def identity_file(chosen: Path | None, *, kind: str) -> Iterator[Path]:
    """The file of an identity that nobody else uses until the context is left: the chosen one, or the first free slot.

    Raises `UserError` if the chosen one is in use.
    """
    slots = (cache_folder() / "identities" / f"{kind}-{number}" for number in itertools.count())
    for path in [chosen] if chosen is not None else slots:
        with _locked(path) as is_ours:
            if is_ours:
                yield path
                return
    raise UserError(
        f"another process uses the identity {chosen}",
        hint="two peers cannot have one identity: name another file, or leave --identity out",
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as failure:
        raise UserError(
            f"no identity can be kept at {path}: {failure.strerror}",
            hint="choose a place that you may write to: --identity PATH, or SHOAL_CACHE for all that shoal keeps",
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
