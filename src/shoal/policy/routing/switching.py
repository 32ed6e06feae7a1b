"""Whether a session leaves its route for a better one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shoal.policy.routing.costs import Hop, announced_seconds

SAVING_FACTOR = 1.2
"""A move must be expected to save this multiple of its cost, because announcements and measurements are inexact."""
BETTER_FRACTION = 0.8
"""A route is better if its step takes at most this part of the present one's: else noise moves sessions around."""

LOOK_TOKENS = 32
LOOK_SECONDS = 10.0
"""A session that decodes looks for a better route after this many tokens or this much time, whichever comes first. A
look is a search or two."""
MOST_DOUBLINGS = 6


@dataclass(frozen=True)
class Looks:
    """The looks of a session for better routes, and how often it has moved to one.

    Each move doubles the number of tokens and the time to the next look. The speed of servers that are in use is known,
    that of others only announced: where all are busy, those look better that are not known, and a session would wander
    among them and be replayed each time.
    """

    num_looks: int = 0
    num_moves: int = 0
    num_tokens: int = 0
    """How many tokens the session had at the last look."""
    at: float = 0.0
    """When that was, or when the session began."""

    def is_due(self, num_tokens: int, *, now: float) -> bool:
        """Whether a session looks that has `num_tokens` now. One that gets no new tokens does not."""
        num_new, longer = num_tokens - self.num_tokens, 1 << min(self.num_moves, MOST_DOUBLINGS)
        return num_new >= LOOK_TOKENS * longer or (num_new > 0 and now - self.at >= LOOK_SECONDS * longer)

    def looked(self, num_tokens: int, *, now: float) -> Looks:
        """After one more look."""
        return replace(self, num_looks=self.num_looks + 1, num_tokens=num_tokens, at=now)

    def moved(self) -> Looks:
        """After a move."""
        return replace(self, num_moves=self.num_moves + 1)

    def cropped(self, num_tokens: int) -> Looks:
        """The session has `num_tokens` now, perhaps fewer than at the last look."""
        return replace(self, num_tokens=min(self.num_tokens, num_tokens))

    def stages(self, excess_seconds: Sequence[float]) -> tuple[int, ...]:
        """For which stages the session looks this time: the one that has become slowest, and one in turn.

        `excess_seconds` says for each stage by how much a step takes longer than its server announces. So a long route
        is as soon rid of a slow server as a short one.
        """
        slowest = max(range(len(excess_seconds)), key=lambda index: excess_seconds[index])
        return tuple(dict.fromkeys((slowest, self.num_looks % len(excess_seconds))))


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
