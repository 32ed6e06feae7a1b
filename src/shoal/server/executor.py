"""The compute thread: everything that touches weights runs here, one function after another.

It should be the only thread of its process that shares work out to others. Each thread that does keeps a team of
threads, and as soon as the teams together have more threads than there are cores, OpenMP lets them sleep between
products instead of waiting awake: on two cores that costs a decoding step 6 ms of 18. So a server's event loop, and
whoever reads a prompt's names beside it, compute alone (`alone`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Abandoned(Exception):
    """The server stops: what is computed is of no use any more."""


class Executor:
    """Runs functions on one thread of its own, in the order in which they were asked for.

    `num_threads` is how many threads, of which it is one, share the work of an operator; `None` leaves that to torch.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        def begin() -> None:
            if num_threads is not None:
                torch.set_num_threads(num_threads)

        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-compute", initializer=begin)
        self._is_abandoned = False

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. If the caller is cancelled before its turn, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """Finish what was asked for, then end the thread."""
        self._thread.shutdown()

    def check(self) -> None:
        """Called now and then by a function that takes long. Raises `Abandoned` if nobody waits for it any more."""
        if self._is_abandoned:
            raise Abandoned

    def abandon(self, last: Callable[[], object] | None = None) -> None:
        """End the thread without waiting for it: at the next `check`, or with the function that it runs.

        If there is a `last` function, the thread runs it before it ends.
        """
        self._is_abandoned = True
        if last is not None:
            self._thread.submit(last)
        self._thread.shutdown(wait=False)


def alone(function: Callable[[], T]) -> T:
    """What `function` returns, computed by this thread without help, from now on."""
    torch.set_num_threads(1)
    return function()
