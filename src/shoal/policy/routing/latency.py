"""What a client or a server learns of others by using them: how far they are, and how slow they really are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shoal.policy.routing.costs import Measured

NEWEST = 0.2
"""The weight of a new measurement against all before."""
HALF_LIFE = 300.0
"""Seconds after which half of what a server's slowness was is forgotten: it may have been busy, and others use it."""
SLOWNESS = 0.25, 64.0
"""The limits of what is believed of one step."""


@dataclass(frozen=True)
class _Slowness:
    """The logarithm of a factor, and when it was learnt."""

    log: float
    at: float


class RoundTrips:
    """Moving averages of round trips, and of how much longer servers take than they announce.

    A round trip is that of a ping on a stream that stands: opening the first stream to a peer dials it, which takes
    several.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._slowness: dict[str, _Slowness] = {}

    def measured(self, peer: str, seconds: float) -> None:
        """A message went there and back in this time."""
        upstream = self._seconds.get(peer, seconds)
        self._seconds[peer] = upstream + NEWEST * (seconds - upstream)

    def of(self, peer: str) -> float | None:
        """The round trip in seconds; None if it was never measured."""
        return self._seconds.get(peer)

    def forget(self, peer: str) -> None:
        """It is elsewhere now, or nowhere."""
        self._seconds.pop(peer, None)

    def measured_step(self, peer: str, predicted_seconds: float, seen_seconds: float) -> None:
        """A step took this time on a server that, by its own word (`announced_seconds`), takes that."""
        if not (0 < predicted_seconds < math.inf and 0 < seen_seconds < math.inf):
            return
        low, high = SLOWNESS
        seen = math.log(min(max(seen_seconds / predicted_seconds, low), high))
        known = peer in self._slowness
        log = (1 - NEWEST) * math.log(self.slowness(peer)) + NEWEST * seen if known else seen
        self._slowness[peer] = _Slowness(log, self._clock())

    def slowness(self, peer: str) -> float:
        """By how much more time it takes than it announces; 1 if nothing else is known."""
        known = self._slowness.get(peer)
        return 1.0 if known is None else math.exp(known.log * 0.5 ** ((self._clock() - known.at) / HALF_LIFE))

    def picture(
        self, *, apart: frozenset[tuple[str, str]] = frozenset(), under_way: Mapping[str, float] | None = None
    ) -> Measured:
        """All of it at this moment, and what else the client knows, for choosing a route."""
        return Measured(
            round_trips=dict(self._seconds),
            slowness={peer: self.slowness(peer) for peer in self._slowness},
            apart=apart,
            under_way=under_way or {},
        )
