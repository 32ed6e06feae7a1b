"""Servers that share a processor take turns: a pass that uses all cores ends before the next one begins.

Two such passes at once take far more than twice as long: at the end of every matrix product each waits for threads
that the other one keeps from running. The turn is a locked file, which the system frees should its holder die. Whoever
waits for it locks a second file, the line, so that the one who has just had the turn comes after him.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import torch

from shoal.server.executor import Executor

LATELY_SECONDS = 2.0
LOOK_SECONDS = 0.0005
PATIENCE_SECONDS = 2.0
"""A server that has the turn for longer is stopped, or computes something huge: others go on beside it."""


class CpuTurns:
    """All the cores of this machine, as far as this user's servers are concerned; one of them has them at a time."""

    def __init__(self, executor: Executor, folder: Path) -> None:
        self._executor = executor
        self._waited_at = float("-inf")
        folder.mkdir(mode=0o700, exist_ok=True)
        self._line, self._iterate = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            for name in ("line", "turn")
        )

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have all cores while the context lasts; or share them, if whoever has them does not let go of them."""
        if not self._lock_at_once():
            self._waited_at = time.monotonic()
            view = asyncio.ensure_future(self._executor.run(self._lock_in_line))
            try:
                await asyncio.shield(view)
            except asyncio.CancelledError:
                view.add_done_callback(lambda _: self._unlock())  # the turn comes all the same
                raise
        try:
            yield
        finally:
            self._unlock()

    @property
    def contended(self) -> bool:
        """Whether another server had the cores when they were asked for, now or lately."""
        return time.monotonic() - self._waited_at < LATELY_SECONDS

    def _lock_at_once(self) -> bool:
        if not _locked(self._line):
            return False
        has_turn = _locked(self._iterate)
        fcntl.flock(self._line, fcntl.LOCK_UN)
        return has_turn

    def _lock_in_line(self) -> None:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        for file in (self._line, self._iterate):
            while not _locked(file) and time.monotonic() < give_up_at:
                time.sleep(LOOK_SECONDS)
        fcntl.flock(self._line, fcntl.LOCK_UN)

    def _unlock(self) -> None:
        fcntl.flock(self._iterate, fcntl.LOCK_UN)

    def close(self) -> None:
        """To be called when the executor is closed: it may be waiting for the turn."""
        os.close(self._line)
        os.close(self._iterate)


def _locked(file: int) -> bool:
    """Lock a file, if nobody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def turn_of(cpu_turns: CpuTurns | None) -> contextlib.AbstractAsyncContextManager[None]:
    """The turn of a server that shares cores; one that shares none always has it."""
    return contextlib.nullcontext() if cpu_turns is None else cpu_turns.turn()


def uses_all_cores(device: torch.device, num_threads: int) -> bool:
    """Whether a pass leaves no room for another one beside it."""
    return device.type == "cpu" and 2 * num_threads > (psutil.cpu_count(logical=False) or 1)


def folder_of_turns() -> Path:
    """Where this user's servers meet."""
    return Path(tempfile.gettempdir()) / f"shoal-turns-{os.getuid()}"
