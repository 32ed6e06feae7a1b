from __future__ import annotations

import os

# Before torch is imported: matrices are tiny, and each of several workers has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio: it is the only loop that shoal supports."""
    return "asyncio"
