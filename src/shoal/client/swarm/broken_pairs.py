"""Servers that cannot reach one another."""

from __future__ import annotations

from collections.abc import Callable

RETRY_PUSH_SECONDS = 300.0
"""Two servers that could not reach one another may be able to after some time."""


class BrokenPairs:
    """Pairs of servers, in this order, of which the first could not push to the second lately."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[tuple[str, str], float] = {}

    def add(self, before: str, after: str) -> None:
        self._until[before, after] = self._clock() + RETRY_PUSH_SECONDS

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return self._until.get(pair, float("-inf")) > self._clock()

    def now(self) -> frozenset[tuple[str, str]]:
        """All of them."""
        return frozenset(pair for pair in self._until if pair in self)
