"""Virtual time: what happens when, in order. Nothing here waits."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Act = Callable[[], None]


class Timeline:
    """Acts at their times. Acts of the same time happen in the order in which they were planned."""

    def __init__(self, *, now: float = 0.0) -> None:
        self.now = now
        self.num_acts = 0
        self._order = itertools.count()
        self._planned: list[tuple[float, int, Act]] = []

    def at(self, seconds: float, act: Act) -> None:
        """Plan an act at a time. A time that is over already means now."""
        heapq.heappush(self._planned, (max(seconds, self.now), next(self._order), act))

    def after(self, seconds: float, act: Act) -> None:
        """Plan an act for `seconds` from now."""
        self.at(self.now + seconds, act)

    def run_until(self, end: float) -> None:
        """Do all acts before `end`, also those that are planned meanwhile. Then it is `end`.

        Until infinity means: until nothing is planned but for never.
        """
        while self._planned and self._planned[0][0] < end:
            self.now, _, act = heapq.heappop(self._planned)
            self.num_acts += 1
            act()
        if end < float("inf"):
            self.now = max(self.now, end)
