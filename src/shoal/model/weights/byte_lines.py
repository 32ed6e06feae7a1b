"""Lines in the log about bytes that are read or downloaded, where no terminal shows a bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

PROGRESS = logging.getLogger("shoal.progress")
LINE_SECONDS = 5.0
"""The shortest time between two lines about the same bytes."""


class ByteLines:
    """Logs how many bytes of `total` have come, `come` of them before."""

    def __init__(self, task: str, *, total: int, come: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._task = task
        self._total = total
        self._come = come
        self._clock = clock
        self._logged_at = clock()

    def advance(self, num_bytes: float) -> None:
        """Count these bytes, and log a line unless one was logged a moment ago."""
        self._come += int(num_bytes)
        now = self._clock()
        if now - self._logged_at >= LINE_SECONDS:
            self._logged_at = now
            PROGRESS.info("%s: %s of %s MB", self._task, f"{self._come / 1e6:,.0f}", f"{self._total / 1e6:,.0f}")
