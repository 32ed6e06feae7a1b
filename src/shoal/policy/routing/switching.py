"""Whether a session leaves its route for a better one."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.policy.routing.costs import Hop, announced_seconds

SAVING_FACTOR = 1.2
"""A move must be expected to save this multiple of its cost, because announcements and measurements are inexact."""
BETTER_FRACTION = 0.8
"""A route is better if its step takes at most this part of the present one's: else noise moves sessions around."""

LOOK_TOKENS = 32
"""A session looks for a better route after this many tokens, if it has not moved yet. One look is a search."""
MOST_DOUBLINGS = 6


def tokens_to_next_look(num_moves: int) -> int:
    """After how many tokens a session looks for a better route that has moved to a better one `num_moves` times.

    Each move doubles it. The speed of servers that are in use is known, that of others only announced: where all are
    busy, those look better that are not known, and a session would wander among them and be replayed each time.
    """
    return LOOK_TOKENS << min(num_moves, MOST_DOUBLINGS)


def replay_seconds(hops: Iterable[Hop], num_tokens: int) -> float:
    """The seconds in which `hops`, one after another, compute the `num_tokens` of a session's history again."""
    return sum(announced_seconds(hop.server, len(hop.span), num_tokens) for hop in hops) if num_tokens else 0.0


def pays_to_move(
    *, step_seconds: float, better_step_seconds: float, replay_seconds: float, num_steps_left: float
) -> bool:
    """Whether the steps that are left gain more on a better route than replaying the history there costs."""
    if better_step_seconds > BETTER_FRACTION * step_seconds:
        return False
    return num_steps_left * (step_seconds - better_step_seconds) > SAVING_FACTOR * replay_seconds
