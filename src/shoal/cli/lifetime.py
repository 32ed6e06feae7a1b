"""How a process that runs until it is told to stop ends: politely, at once when told again, and with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any, NoReturn

from shoal.cli.console import stderr


def run_until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which never ends by itself, until Ctrl-C or SIGTERM; then cancel it and wait for it to clean up.

    Then the process ends, with status 0 and without returning from here: what its threads still compute, such as
    blocks that are being loaded, is not waited for. Nor are the libraries taken apart, which takes a process that has
    imported PyTorch and hivemind one to two seconds of a core; where several servers stop at once, they add up.

    A second signal ends the process on the spot; the system and those who watch us clean up then. Raises what `work`
    raises.
    """
    if asyncio.run(_until_signalled(work)):
        end_now(0)


def end_now(status: int) -> NoReturn:
    """End this process, as soon as what it has said is written."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(status)


async def _until_signalled(work: Coroutine[Any, Any, None]) -> bool:
    """Returns whether a signal ended it."""
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
    return signalled


def end_with_parent() -> None:
    """Take the end of stdin, a pipe that only our parent holds, for a SIGTERM: however it ended, we do too."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="shoal-parent", daemon=True).start()
