from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

# Before torch is imported: matrices are tiny, and each of several workers has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("shoal", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("shoal")

LONGEST = "test_schedules.py"
"""It takes two minutes of a processor. Each file is for one worker: among the last, it would keep one busy alone."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Python looks for no garbage while tests are collected, and never among what was there before them.

    That is half a million objects of imported modules, for 0.3 seconds each time. Servers that free their blocks
    collect garbage, and so do tests of what is freed.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first; all others, and the tests in it, keep their order."""
    items.sort(key=lambda item: item.path.name != LONGEST)


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
