from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# Before torch is imported: matrices are tiny, and each of several workers has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("shoal", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("shoal")

LONGEST = "test_schedules.py"
"""It takes two minutes of a processor. Each file is for one worker: among the last, it would keep one busy alone."""
WAITING = ("net", "clients")
"""The folders of tests that start processes, and wait for them half of the time."""
AMONG = 6
"""After each file of waiting tests come so many others, which use the processors meanwhile."""


HANGS_AFTER = 300
"""Seconds. Most tests take less than one, and the longest take a minute on a busy machine with two cores."""


def _waits_at(task: asyncio.Task[Any]) -> str:
    """The chain of coroutines at whose end a task waits."""
    chain, coroutine = [task.get_name()], task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        chain.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        coroutine = getattr(coroutine, "cr_await", None)
    return " > ".join(chain)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test that hangs fails, and says where its tasks wait. Where this cannot end it, `faulthandler` does."""

    def end(signum: int, frame: FrameType | None) -> None:
        tasks: set[asyncio.Task[Any]] = set()
        with contextlib.suppress(RuntimeError):  # there is no event loop
            tasks = asyncio.all_tasks()
        pytest.fail("\n    ".join([f"hangs for {HANGS_AFTER} s", *(_waits_at(task) for task in tasks)]))

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(HANGS_AFTER)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Python looks for no garbage while tests are collected, never among what was there before them, and seldom later.

    That is half a million objects of imported modules, for 0.3 seconds each time; looking as often as Python does takes
    a tenth of the time of all tests. Servers that free their blocks collect garbage, and so do tests of what is freed.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 10, 50)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, files of tests that wait are spread among others, and a file keeps its order."""
    waiting, others = (
        list(dict.fromkeys(item.path for item in items if (item.path.parent.name in WAITING) is waits))
        for waits in (True, False)
    )
    place = {path: AMONG * index for index, path in enumerate(waiting)} | {
        path: index for index, path in enumerate(others)
    }
    items.sort(key=lambda item: (item.path.name != LONGEST, place[item.path], item.path))


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Commands set up the log of the process in which they run: other tests read it by `caplog`."""
    logger = logging.getLogger("shoal")
    handlers, level, propagates = [*logger.handlers], logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagates


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio: it is the only loop that shoal supports."""
    return "asyncio"
