"""What a peer learns of servers by using them: their round trips, and by how much they are slower than they announce.

The values are frozen, and time is an argument. Clients keep them in `client/swarm/measurements.py`, servers in
`server/neighbors.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NEWEST = 0.2
"""The weight of a new measurement in a moving average."""
HALF_LIFE = 300.0
"""Seconds after which half of a server's slowness is forgotten: it may have been busy, or be used by others now."""
LEAST_SLOWNESS = 0.25
"""A server counts as four times as fast as it announces at most."""
HICCUP = 64.0
"""One step shows at most this multiple of the slowness that is known, so that a single hiccup does not condemn a
server. There is no other limit: a server that stays slow comes to count as slow as it is."""
UNEXPLAINED_SECONDS = 1.0
UNEXPLAINED_FACTOR = 5.0
"""A server that says how long a step took is not believed if the client has waited longer than that many seconds, and
than this multiple of what it says."""


def average_round_trip(average: float | None, seconds: float) -> float:
    """The moving average in seconds after one more measurement; `average` is None before the first.

    A round trip is that of a ping on an open stream. Opening the first stream to a peer dials it, which takes several
    round trips.
    """
    return seconds if average is None else average + NEWEST * (seconds - average)


def seen_seconds(said: float, *, waited: float, round_trip: float) -> float:
    """The seconds that a step took on a server that says it took `said`; the client has waited `waited` for it.

    A server is believed, except if it is far from what the client has seen: a busy client or a slow link explain some
    of the difference.
    """
    seen = waited - round_trip
    return seen if seen > max(UNEXPLAINED_SECONDS, UNEXPLAINED_FACTOR * said) else said


@dataclass(frozen=True)
class Slowness:
    """By what factor a server takes longer than it announces: the factor's logarithm, and when it was learned."""

    log: float
    at: float

    def factor(self, now: float) -> float:
        """The factor that is believed at the time `now`. It decays towards 1."""
        return math.exp(self.log * 0.5 ** ((now - self.at) / HALF_LIFE))


def after_step(known: Slowness | None, predicted_seconds: float, seen_seconds: float, *, now: float) -> Slowness | None:
    """The slowness of a server after one more step; `known` is None before the first.

    The step took `seen_seconds` on a server that announces `predicted_seconds` for it (`announced_seconds`). Times that
    are not positive and finite change nothing.
    """
    if not (0 < predicted_seconds < math.inf and 0 < seen_seconds < math.inf):
        return known
    before = 1.0 if known is None else known.factor(now)
    seen = min(max(seen_seconds / predicted_seconds, LEAST_SLOWNESS), HICCUP * max(1.0, before))
    log = math.log(seen) if known is None else (1 - NEWEST) * math.log(before) + NEWEST * math.log(seen)
    return Slowness(log, now)
