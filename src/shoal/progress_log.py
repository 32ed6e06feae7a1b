"""Lines in the log about work that takes long, where no terminal shows a bar: which of them are written, and how."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

PROGRESS = logging.getLogger("shoal.progress")
"""The logger of progress lines. They replace the spinner where stderr is not a terminal."""
MIN_LINE_SECONDS = 5.0
"""The shortest time between two lines about steps of the same kind, such as blocks that are loaded."""
REMINDER_SECONDS = 10.0
"""The time after which a task that still runs is logged again."""


class ProgressLog:
    """Decides which tasks and steps get a log line: every task, but not every step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._task = self._step = ""
        self._logged_at = self._started_at = clock()

    def line_for(self, task: str, step: str = "") -> str | None:
        """Note that this task and step have begun. Returns the line to log, or None."""
        now = self._clock()
        if task != self._task:
            self._started_at = now
        elif now - self._logged_at < MIN_LINE_SECONDS:
            self._step = step
            return None
        self._task, self._step, self._logged_at = task, step, now
        return self._line()

    def reminder(self) -> str | None:
        """The line for a task that still runs and was not logged for `REMINDER_SECONDS`; else None."""
        now = self._clock()
        if not self._task or now - self._logged_at < REMINDER_SECONDS:
            return None
        self._logged_at = now
        return f"{self._line()} (for {now - self._started_at:.0f} s)"

    def clear(self) -> None:
        """Forget the task: it has ended."""
        self._task = ""

    def _line(self) -> str:
        return f"{self._task}: {self._step}" if self._step else self._task


class ByteLines:
    """Logs how many bytes of a task have come: of `total` ones, 0 if that is not known, and `come` of them before."""

    def __init__(self, task: str, *, total: int, come: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._task = task
        self._of = f" of {total / 1e6:,.0f}" if total else ""
        self._come = come
        self._log = ProgressLog(clock)
        self._log.line_for(task)  # which is not written: most tasks end before they are worth a line

    def advance(self, num_bytes: float) -> None:
        """Count these bytes, and log a line unless one was logged a moment ago."""
        self._come += int(num_bytes)
        if line := self._log.line_for(self._task, f"{self._come / 1e6:,.0f}{self._of} MB"):
            PROGRESS.info("%s", line)
