"""Servers to keep away from for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_SECONDS = 2.0
LONGEST_SECONDS = 120.0


@dataclass(frozen=True)
class Suspicion:
    """Until when a server is avoided, and why; `num_failures` in a row make it grow."""

    until: float
    reason: str
    num_failures: int


class Suspects:
    """Remembers who failed. A suspect is avoided at once, for twice as long each time, and forgiven when it answers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._suspicions: dict[str, Suspicion] = {}

    def __contains__(self, peer: str) -> bool:
        suspicion = self._suspicions.get(peer)
        return suspicion is not None and self._clock() < suspicion.until

    def lost(self, peer: str, reason: str) -> None:
        """It failed."""
        before = self._suspicions.get(peer)
        num_failures = 1 if before is None else before.num_failures + 1
        seconds = min(FIRST_SECONDS * 2 ** (num_failures - 1), LONGEST_SECONDS)
        self._suspicions[peer] = Suspicion(self._clock() + seconds, reason, num_failures)

    def busy(self, peer: str, seconds: float, reason: str) -> None:
        """It said when to come back, which is no failure."""
        before = self._suspicions.get(peer)
        num_failures = 0 if before is None else before.num_failures
        self._suspicions[peer] = Suspicion(self._clock() + seconds, reason, num_failures)

    def forgive(self, peer: str) -> None:
        """It answered."""
        self._suspicions.pop(peer, None)

    def seconds_left(self) -> float | None:
        """How long until the first of them may be tried again; `None` if there is no suspect."""
        waits = [suspicion.until - self._clock() for peer, suspicion in self._suspicions.items() if peer in self]
        return min(waits, default=None)

    def reasons(self) -> list[str]:
        """Why each of them is avoided, for an error message."""
        return [f"{peer[-8:]}: {suspicion.reason}" for peer, suspicion in self._suspicions.items() if peer in self]
