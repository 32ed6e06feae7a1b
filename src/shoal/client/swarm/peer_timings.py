"""What a client has measured of servers by using them: round trips, and how much slower they are than they announce."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.policy.routing.costs import Measured
from shoal.policy.routing.latency import Slowness, after_step, average_round_trip


class PeerTimings:
    """Moving averages of each server's round trip and slowness (`shoal.policy.routing.latency`)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._round_trips: dict[str, float] = {}
        self._slowness: dict[str, Slowness] = {}

    def round_trips(self) -> Mapping[str, float]:
        """The round trips that were measured, in seconds, by peer id."""
        return self._round_trips

    def record_round_trip(self, peer: str, seconds: float) -> None:
        """A ping on an open stream was answered in `seconds`."""
        self._round_trips[peer] = average_round_trip(self._round_trips.get(peer), seconds)

    def record_step(self, peer: str, predicted_seconds: float, seen_seconds: float) -> None:
        """A step took `seen_seconds` on a server that announces `predicted_seconds` for it."""
        slowness = after_step(self._slowness.get(peer), predicted_seconds, seen_seconds, now=self._clock())
        if slowness is not None:
            self._slowness[peer] = slowness

    def slowness(self, peer: str) -> float:
        """By what factor a server takes longer than it announces; 1 if it was never measured."""
        known = self._slowness.get(peer)
        return 1.0 if known is None else known.factor(self._clock())

    def measured(
        self,
        *,
        broken_pairs: frozenset[tuple[str, str]] = frozenset(),
        work_in_flight: Mapping[str, float] | None = None,
    ) -> Measured:
        """A frozen copy of all averages at this moment, with what else the client knows, for choosing a route."""
        return Measured(
            round_trips=dict(self._round_trips),
            slowness={peer: self.slowness(peer) for peer in self._slowness},
            broken_pairs=broken_pairs,
            work_in_flight=work_in_flight or {},
        )
