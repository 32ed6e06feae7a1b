from __future__ import annotations

import gc
import os

# Before torch is imported: matrices are tiny, and each of several workers has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("shoal", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("shoal")


def pytest_collection_finish() -> None:
    """The garbage collector need not look at what was imported: half a million objects, each time for 0.3 seconds.

    Servers that free their blocks collect garbage, and so do tests of what is freed.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio: it is the only loop that shoal supports."""
    return "asyncio"
