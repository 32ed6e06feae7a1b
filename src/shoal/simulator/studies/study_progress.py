"""How far a study is: a bar on a terminal, a line now and then in a log. Both go to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""The shortest time between two lines in a log."""

Advance = Callable[[float, str], None]
"""Says that a share of the study more is done, and what comes now."""


@contextlib.contextmanager
def progress(
    title: str,
    *,
    as_lines: bool = False,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Show the progress of a study until the context ends. Several at a time are shown `as_lines`."""
    console = Console(file=stream or sys.stderr, highlight=False)
    if as_lines or not console.is_terminal:
        yield _Lines(title, console, clock).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)

        def advance(share: float, now: str) -> None:
            bar.update(task, advance=share, description=f"{title}: {now}" if now else title)

        yield advance


class _Lines:
    def __init__(self, title: str, console: Console, clock: Callable[[], float]) -> None:
        self._title = title
        self._console = console
        self._clock = clock
        self._began = clock()
        self._done = 0.0
        self._last = float("-inf")

    def advance(self, share: float, now: str) -> None:
        self._done += share
        if self._clock() - self._last >= LINE_SECONDS or self._done >= 1 - 1e-9:
            self._last = self._clock()
            passed = self._last - self._began
            bar = "#" * round(20 * min(1.0, self._done))
            self._console.print(
                f"{self._title} [{bar:<20}] {100 * self._done:3.0f} %, {passed:.0f} s{': ' + now if now else ''}",
                markup=False,
                soft_wrap=True,
            )
