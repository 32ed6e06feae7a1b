"""Pairs of servers that cannot push to one another."""

from __future__ import annotations

from collections.abc import Callable

RETRY_PUSH_SECONDS = 300.0
"""How long a pair counts as broken: after that, one server may reach the other again."""


class BrokenPairs:
    """Ordered pairs of servers: lately, the first could not push to the second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[tuple[str, str], float] = {}

    def add(self, upstream: str, downstream: str) -> None:
        """The server `upstream` could not push to `downstream`."""
        until = self._clock() + RETRY_PUSH_SECONDS
        self._until[upstream, downstream] = max(until, self._until.get((upstream, downstream), until))

    def add_for_good(self, upstream: str, downstream: str) -> None:
        """What `upstream` pushes to `downstream` is not to be trusted, or what that makes of it."""
        self._until[upstream, downstream] = float("inf")

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return self._until.get(pair, float("-inf")) > self._clock()

    def now(self) -> frozenset[tuple[str, str]]:
        """All pairs that are broken now."""
        return frozenset(pair for pair in self._until if pair in self)
