"""Servers that share a processor take turns: a pass that uses all cores ends before the next one begins.

Two such passes at once take far more than twice as long: at the end of every matrix product each waits for threads
that the other one keeps from running. The turn is a locked file, which the system frees should its holder die. A server
that waits for the turn locks a second file, the queue, so that the server that has just had the turn comes after it.
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

CONTENDED_SECONDS = 2.0
"""How long the processor counts as contended after a server had to wait for it: several decoding passes."""
RETRY_LOCK_SECONDS = 0.0005
"""How often a waiting server tries to lock the file: a small part of the fastest pass."""
PATIENCE_SECONDS = 2.0
"""A server that has the turn for longer is stopped, or computes something huge: others compute beside it."""


class CpuTurns:
    """The cores of this machine, which one of this user's servers has at a time.

    `folder` holds the two lock files; it is made if it does not exist.
    """

    def __init__(self, executor: Executor, folder: Path) -> None:
        self._executor = executor
        self._waited_at = float("-inf")
        self._own = asyncio.Lock()  # a server has two engines while it goes to other blocks
        folder.mkdir(mode=0o700, exist_ok=True)
        self._queue_file, self._turn_file = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            for name in ("queue", "turn")
        )

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have all cores while the context lasts, or share them with a server that does not give them back."""
        async with self._own, self._locked():
            yield

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        if not self._lock_at_once():
            self._waited_at = time.monotonic()
            waiting = asyncio.ensure_future(self._executor.run(self._wait_for_lock))
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                waiting.add_done_callback(lambda _: self._unlock())  # the compute thread gets the lock all the same
                raise
        try:
            yield
        finally:
            self._unlock()

    @property
    def contended(self) -> bool:
        """Whether another server had the cores when this one asked for them, in the last `CONTENDED_SECONDS`."""
        return time.monotonic() - self._waited_at < CONTENDED_SECONDS

    def _lock_at_once(self) -> bool:
        if not _locked(self._queue_file):
            return False
        has_turn = _locked(self._turn_file)
        fcntl.flock(self._queue_file, fcntl.LOCK_UN)
        return has_turn

    def _wait_for_lock(self) -> None:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        for file in (self._queue_file, self._turn_file):
            while not _locked(file) and time.monotonic() < give_up_at:
                time.sleep(RETRY_LOCK_SECONDS)
        fcntl.flock(self._queue_file, fcntl.LOCK_UN)

    def _unlock(self) -> None:
        fcntl.flock(self._turn_file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the lock files. To be called after the executor is closed, which may be waiting for them."""
        os.close(self._queue_file)
        os.close(self._turn_file)


def _locked(file: int) -> bool:
    """Lock a file, unless another server has locked it. Returns whether it is locked now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def turn_of(cpu_turns: CpuTurns | None) -> contextlib.AbstractAsyncContextManager[None]:
    """The turn of a server that shares cores. A server that shares none always has it."""
    return contextlib.nullcontext() if cpu_turns is None else cpu_turns.turn()


def uses_all_cores(device: torch.device, num_threads: int) -> bool:
    """Whether a pass on this device leaves no cores for another one beside it."""
    return device.type == "cpu" and 2 * num_threads > (psutil.cpu_count(logical=False) or 1)


def folder_of_turns() -> Path:
    """The folder of the lock files that this user's servers share."""
    return Path(tempfile.gettempdir()) / f"shoal-turns-{os.getuid()}"
