"""An event loop on which waiting takes no time: its clock jumps to the next timer.

Unlike `tests.swarm.virtual_time`, it works with threads, and a test may leave tasks behind.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Never waits. An endless wait is an error."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("nothing will ever happen")
        self.now += max(0.0, timeout)
        return super().select(0)


def virtual_loop() -> asyncio.AbstractEventLoop:
    """A loop whose time is virtual, and begins at 0."""
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    return loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """The same as `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        return runner.run(main)
