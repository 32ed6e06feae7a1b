"""How a process that runs until it is told to stop ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

SECONDS = 60.0
"""Nothing below takes that long; a process that does never ends."""

SCRIPT = """
import asyncio, atexit, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from shoal.cli.lifetime import run_until_signalled

never = threading.Event()
atexit.register(never.wait)
loading = ThreadPoolExecutor().submit(never.wait)

async def work():
    print("serving")
    try:
        os.kill(os.getpid(), signal.{signal})
        await asyncio.wrap_future(loading)
    finally:
        await asyncio.sleep(0)
        print("goodbye")

run_until_signalled(work())
"""


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_process_when_its_goodbye_is_said_whatever_is_still_computed(signal: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(signal=signal)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["serving", "goodbye"]
    assert done.stderr.splitlines() == ["leaving the swarm (again to end at once)"]
