"""What `shoal serve` and `shoal dht` need because they run until they are stopped: an identity, and a clean end.

A server that restarts is the same peer if it has the same key. Two processes that run at the same time must have
different keys: other peers would take them for one. So the keys are in numbered files,
`~/.cache/shoal/identities/serve-0` and so on, and a process takes the first one that no other process has locked. The
lock is on a file beside the key. The system releases it however the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from shoal.cli.terminal.console import stderr
from shoal.cli.terminal.notify import notify
from shoal.errors import UserError
from shoal.ledgers.ledger_place import identity_folder
from shoal.model.weights.disk_cache import cache_folder


@contextlib.contextmanager
def identity_file(chosen: Path | None, *, kind: str) -> Iterator[Path]:
    """The file of an identity, locked until the context ends: the chosen one, or else the first free numbered one.

    Raises `UserError` if another process uses the chosen file, or if the lock cannot be written.
    """
    numbered = (identity_folder(cache_folder()) / f"{kind}-{number}" for number in itertools.count())
    for path in [chosen] if chosen is not None else numbered:
        with _locked(path) as is_locked:
            if is_locked:
                yield path
                return
    raise UserError(
        f"another process uses the identity {chosen}",
        hint="every peer needs its own identity: name another file, or leave out --identity",
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as failure:
        raise UserError(
            f"the identity file {path} cannot be written: {failure.strerror}",
            hint="choose a writable place: with --identity FILE, or with SHOAL_CACHE for all files that shoal keeps",
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_until_signalled(work: Coroutine[Any, Any, None], *, cleanup: str = "leaving the swarm") -> None:
    """Run `work` until Ctrl-C or SIGTERM, then cancel it, wait for its cleanup, and end the process with status 0.

    `cleanup` is what the user is told that it does then.

    This function does not return after a signal. The process does not wait for its threads, which may still be loading
    blocks. It also skips the interpreter's shutdown: with PyTorch and hivemind imported, that takes one to two seconds
    of a core, which add up when several servers stop at once.

    A second signal ends the process immediately; the system and the parent process clean up. Raises what `work` raises.
    """
    if asyncio.run(_until_signalled(work, cleanup)):
        end_now(0)


def end_now(status: int) -> NoReturn:
    """Write what is buffered, and end this process without any other cleanup."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader has gone
            stream.flush()
    os._exit(status)


async def _until_signalled(work: Coroutine[Any, Any, None], cleanup: str) -> bool:
    """Run `work`. Returns whether a signal ended it."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    signalled = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal signalled
        if signalled:
            stderr.show_cursor()
            os._exit(128 + number)
        signalled = True
        notify(STOPPING="1", STATUS=cleanup.capitalize())
        stderr.print(f"{cleanup}; a second Ctrl-C quits immediately", style="dim")
        loop.call_soon_threadsafe(task.cancel)

    # Not the loop's own handlers: they run in the loop, which may be blocked while blocks are loaded.
    replaced = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await task
    except asyncio.CancelledError:
        if not signalled:
            raise
    finally:
        if not signalled:  # the process goes on, and `stop` would call a loop that is closed
            for number, handler in replaced.items():
                signal.signal(number, handler)
    return signalled


def end_with_parent() -> None:
    """Send this process a SIGTERM when stdin ends. Only the parent holds its other end, so it ends with the parent."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="shoal-parent", daemon=True).start()
