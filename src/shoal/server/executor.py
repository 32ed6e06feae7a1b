"""The compute thread: everything that touches weights runs here, one function after another.

It should be the only thread of its process that splits its work among several threads. Each thread that does so keeps a
team of threads. As soon as the teams together have more threads than the machine has cores, OpenMP lets them sleep
between products instead of spinning, if they may spin at all (`shoal.cli.share_cores`): on two cores that costs a
decoding step 6 ms of 18. So a server's event loop, and the threads that name a prompt's pages, compute without a team
(`alone`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Abandoned(Exception):
    """The server stops: the result of this computation is not needed any more."""


class Executor:
    """Runs functions on one thread of its own, in the order in which they were submitted.

    `num_threads` is how many threads, this one included, share the work of an operator; None leaves that to torch.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        def begin() -> None:
            if num_threads is not None:
                torch.set_num_threads(num_threads)

        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-compute", initializer=begin)
        self._is_abandoned = False

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. It never runs if the caller is cancelled before its turn."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """Run the functions that were submitted, then end the thread."""
        self._thread.shutdown()

    def check(self) -> None:
        """To be called now and then by a function that takes long. Raises `Abandoned` when the server stops."""
        if self._is_abandoned:
            raise Abandoned

    def abandon(self, last: Callable[[], object] | None = None) -> None:
        """End the thread without waiting for it: at the next `check`, or when the function that it runs returns.

        The thread runs the `last` function, if there is one, before it ends.
        """
        self._is_abandoned = True
        if last is not None:
            self._thread.submit(last)
        self._thread.shutdown(wait=False)


def alone(function: Callable[[], T]) -> T:
    """What `function` returns. From now on, the calling thread computes without a team of threads."""
    torch.set_num_threads(1)
    return function()
