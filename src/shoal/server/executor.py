"""The compute thread: everything that touches weights runs here, one function after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Executor:
    """Runs functions on one thread of its own, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-compute")

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. If the caller is cancelled before its turn, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """Finish what was asked for, then end the thread."""
        self._thread.shutdown()
