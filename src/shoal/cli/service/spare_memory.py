"""Memory that a server has freed goes back to the system now and then.

The C library keeps what is freed for later: in heaps of several threads, with holes between what is in use. After many
large requests that can be some hundred megabytes, for good.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable

import psutil

LOOK_SECONDS = 10.0
"""How often a server looks whether it has grown. What goes back, and is needed again, costs some milliseconds."""
SPARE_BYTES = 32 << 20
"""A server that has grown by less since it last gave memory back keeps it."""


async def give_memory_back(resident: Callable[[], int] | None = None, trim: Callable[[], object] | None = None) -> None:
    """Give freed memory back when this process has grown, until this is cancelled.

    `resident` is how many bytes of memory the process has, and `trim` gives back what is free. By default they are
    those of this process. Where the C library is another one than glibc, nothing happens.
    """
    trim = trim or _glibc_trim()
    if trim is None:
        return
    resident = resident or _resident
    least = 0
    while True:
        if resident() > least + SPARE_BYTES:
            await asyncio.to_thread(trim)
            least = resident()
        await asyncio.sleep(LOOK_SECONDS)
        least = min(least, resident())


def _resident() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def _glibc_trim() -> Callable[[], object] | None:
    """What gives back memory; None if the C library has no such function."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))
