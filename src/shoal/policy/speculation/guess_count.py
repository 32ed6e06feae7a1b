"""How many tokens to guess in the next step, and whether to guess at all.

A step with K guesses takes longer than one without, and gives more tokens if they are right. The best K follows from
both. Both are estimates, and a text may be one in which guesses that look good are always wrong. So what guesses have
won and lost is counted, and the next ones may cost what was won, and a small part of all time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from shoal.policy.speculation.acceptance import expected_tokens
from shoal.policy.speculation.step_times import StepTimes

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The numbers of guesses that are compared with none."""
LOSS = 0.01
"""The part of all time that guesses may lose."""
FIRST_LOSS = 0.5
"""How many steps of one token they may lose at first, when nothing is known."""


def num_guesses(
    times: StepTimes, rate: float, *, most: int, most_seconds: float = inf, draft_seconds: float = 0.0
) -> int:
    """How many guesses, each right with this probability, give the most tokens a second; 0 if none do.

    There are `most` at the most, and all of them cost `most_seconds` at the most if they are wrong. Each takes
    `draft_seconds` to make. Without a known step it is 0.
    """
    if not times.is_known or most_seconds <= 0:
        return 0
    each = times.each + draft_seconds
    if each * most > most_seconds:
        most = int(most_seconds / each)

    def speed(count: int) -> float:
        return expected_tokens(rate, count) / (times.of(1) + count * each)

    return max((0, *(count for count in COUNTS if count < most), most), key=speed)


@dataclass(frozen=True)
class Balance:
    """What guesses have `won`, in seconds, or lost if it is negative, of the seconds that `elapsed`."""

    elapsed: float = 0.0
    won: float = 0.0

    def after(self, seconds: float, *, plain_seconds: float) -> Balance:
        """After a step that took `seconds`, and whose tokens would have taken `plain_seconds` without guesses."""
        return replace(self, elapsed=self.elapsed + seconds, won=self.won + plain_seconds - seconds)

    def may_lose(self, one_step: float) -> float:
        """How many seconds the next guesses may cost, if a step of one token takes `one_step`."""
        return self.won + LOSS * self.elapsed + FIRST_LOSS * one_step
