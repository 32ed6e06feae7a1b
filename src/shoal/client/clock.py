"""The time in which a client counts its waits."""

from __future__ import annotations

import asyncio


def now() -> float:
    """The event loop's time: the monotonic clock, unless somebody runs the loop in a time of his own."""
    return asyncio.get_running_loop().time()
