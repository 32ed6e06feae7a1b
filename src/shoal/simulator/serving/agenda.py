"""What happens when, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Agenda:
    """Calls functions at their times, in order. `now` is in seconds, and passes only between calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self._entries: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Call `act` at a time, which is not in the past."""
        assert time >= self.now
        heapq.heappush(self._entries, (time, next(self._numbers), act))

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after `seconds`."""
        self.at(self.now + seconds, act)

    def run(self, until: Callable[[], bool]) -> None:
        """Let time pass until a condition holds or nothing is left to happen."""
        while self._entries and not until():
            self.now, _, act = heapq.heappop(self._entries)
            act()
