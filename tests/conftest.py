from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio: it is the only loop that shoal supports."""
    return "asyncio"
