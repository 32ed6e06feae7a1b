"""How a process that runs until it is told to stop ends: politely, at once when told again, and with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any

from shoal.cli.console import stderr


def run_until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which never ends by itself, until Ctrl-C or SIGTERM; then cancel it and wait for it to clean up.

    A second signal ends the process on the spot; the system and those who watch us clean up then. Raises what `work`
    raises.
    """
    asyncio.run(_until_signalled(work))


async def _until_signalled(work: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    signalled = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal signalled
        if signalled:
            stderr.show_cursor()
            os._exit(128 + number)
        signalled = True
        stderr.print("leaving the swarm (again to end at once)", style="dim")
        loop.call_soon_threadsafe(task.cancel)

    # Not the loop's own handlers: they wait for the loop, which may be waiting for the blocks to be loaded.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled:
            raise


def end_with_parent() -> None:
    """Take the end of stdin, a pipe that only our parent holds, for a SIGTERM: however it ended, we do too."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="shoal-parent", daemon=True).start()
