"""Whether to leave a route that works for a better one."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.policy.routing.costs import Hop, announced_seconds

WORTH_IT = 1.2
"""A move is promised to save so many times what it costs: promises and measurements err."""
CLEARLY = 0.8
"""A route is better if its step takes at most this part of the present one's: otherwise, noise moves sessions about."""


def replay_seconds(hops: Iterable[Hop], num_tokens: int) -> float:
    """How long servers take, one after another, to compute a past that another server has lost or is to hand over."""
    return sum(announced_seconds(hop.server, len(hop.span), num_tokens) for hop in hops) if num_tokens else 0.0


def pays_to_move(
    *, step_seconds: float, better_step_seconds: float, replay_seconds: float, num_steps_left: float
) -> bool:
    """Whether the steps that are left gain more by a better route than replaying the past there costs."""
    if better_step_seconds > CLEARLY * step_seconds:
        return False
    return num_steps_left * (step_seconds - better_step_seconds) > WORTH_IT * replay_seconds
