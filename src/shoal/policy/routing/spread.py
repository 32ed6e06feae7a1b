"""Many passes at once, spread over all servers that can share them.

Each pass takes the route on which it will be ready first, given what the others before it were sent: `WorkInFlight`
says how many seconds of work every server has of us. So parallel servers get work in proportion to their speed, and a
far one gets some as soon as waiting for a near one would take longer than the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.policy.routing.route import Route
from shoal.protocol import MAX_STEP_TOKENS

SMALLEST_PASS = 256
"""Tokens: smaller microbatches would take longer in all, as each reads the weights."""


def microbatch_rows(batch_size: int, num_tokens: int, *, num_servers: int) -> int:
    """How many sequences of so many tokens go together, so that all servers that share the work always have some.

    Those before and after each other in a route are busy at the same time if there are about twice as many microbatches
    as servers; those next to each other are given as many as they are faster (`WorkInFlight`).
    """
    most = max(1, MAX_STEP_TOKENS // num_tokens)
    fair = batch_size // max(1, 2 * num_servers)
    least = -(-SMALLEST_PASS // num_tokens)
    return min(most, max(fair, least, 1))


@dataclass(frozen=True)
class WorkInFlight:
    """The seconds of computing that each server was given and has not finished."""

    seconds: Mapping[str, float] = field(default_factory=dict)

    def with_(self, route: Route) -> WorkInFlight:
        """The same, and a pass on this route."""
        return self._changed(route, 1)

    def without(self, route: Route) -> WorkInFlight:
        """The same when such a pass is done, or has failed."""
        return self._changed(route, -1)

    def _changed(self, route: Route, sign: int) -> WorkInFlight:
        seconds = dict(self.seconds)
        for hop, cost in zip(route.hops, route.costs, strict=True):
            left = seconds.pop(hop.server.peer, 0.0) + sign * cost.compute
            if left > 1e-9:  # nothing, but for rounding
                seconds[hop.server.peer] = left
        return WorkInFlight(seconds)
