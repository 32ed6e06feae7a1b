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


class Cores:
    """All the cores of this machine, as far as this user's servers are concerned; one of them has them at a time."""

    def __init__(self, executor: Executor, folder: Path) -> None:
        self._executor = executor
        self._waited_at = float("-inf")
        folder.mkdir(mode=0o700, exist_ok=True)
        self._line, self._turn = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            for name in ("line", "turn")
        )

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have all cores while the context lasts."""
        if not self._at_once():
            self._waited_at = time.monotonic()
            waiting = asyncio.ensure_future(self._executor.run(self._in_line))
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                waiting.add_done_callback(lambda _: self._leave())  # the turn comes all the same
                raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        fcntl.flock(self._turn, fcntl.LOCK_UN)

    @property
    def contended(self) -> bool:
        """Whether another server had the cores when they were last asked for, now or lately."""
        return time.monotonic() - self._waited_at < LATELY_SECONDS

    def _at_once(self) -> bool:
        if not _lock(self._line):
            return False
        has_turn = _lock(self._turn)
        fcntl.flock(self._line, fcntl.LOCK_UN)
        return has_turn

    def _in_line(self) -> None:
        fcntl.flock(self._line, fcntl.LOCK_EX)
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        fcntl.flock(self._line, fcntl.LOCK_UN)

    def close(self) -> None:
        """To be called when the executor is closed: it may be waiting for the turn."""
        os.close(self._line)
        os.close(self._turn)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def uses_all_cores(device: torch.device) -> bool:
    """Whether a pass leaves no room for another one beside it."""
    return device.type == "cpu" and 2 * torch.get_num_threads() > (psutil.cpu_count(logical=False) or 1)


def folder_of_turns() -> Path:
    """Where this user's servers meet."""
    return Path(tempfile.gettempdir()) / f"shoal-turns-{os.getuid()}"
