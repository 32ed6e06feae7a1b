"""Many passes in flight together, spread over all servers that can share them.

Each pass takes the route on which it will be ready first, given the passes that were sent before it: `WorkInFlight`
says how many seconds of this client's work each server has. So parallel servers get work in proportion to their speed,
and a far server gets some once waiting for a near one would take longer than the round trip to the far one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.policy.routing.route import Route
from shoal.protocol import MAX_STEP_TOKENS

SMALLEST_PASS = 256
"""Tokens of the smallest microbatch: each microbatch reads all weights, so smaller ones take longer in sum."""


def microbatch_rows(batch_size: int, num_tokens: int, *, num_servers: int) -> int:
    """How many sequences of `num_tokens` form a microbatch, so that all of `num_servers` always have work.

    Servers that follow each other in a route are busy at the same time if there are about twice as many microbatches as
    servers. Parallel servers share microbatches by their speed (`WorkInFlight`).
    """
    most = max(1, MAX_STEP_TOKENS // num_tokens)
    fair = batch_size // max(1, 2 * num_servers)
    least = -(-SMALLEST_PASS // num_tokens)
    return min(most, max(fair, least, 1))


@dataclass(frozen=True)
class WorkInFlight:
    """The seconds of computing that each server was given by this client and has not finished."""

    seconds: Mapping[str, float] = field(default_factory=dict)

    def added(self, route: Route) -> WorkInFlight:
        """With one more pass on this route."""
        return self._changed(route, 1)

    def removed(self, route: Route) -> WorkInFlight:
        """Without such a pass, when it is done or has failed."""
        return self._changed(route, -1)

    def _changed(self, route: Route, sign: int) -> WorkInFlight:
        seconds = dict(self.seconds)
        for hop, cost in zip(route.hops, route.costs, strict=True):
            left = seconds.pop(hop.server.peer, 0.0) + sign * cost.compute
            if left > 1e-9:  # less is a rounding error
                seconds[hop.server.peer] = left
        return WorkInFlight(seconds)
