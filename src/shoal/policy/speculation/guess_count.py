"""How many tokens to guess in the next step, and whether to guess at all; and by which of several drafts.

A step with K guesses takes longer than one without, and gives more tokens if they are right. The best K follows from
both. Both are estimates, and a text may be one in which guesses that look good are always wrong. So what guesses have
won and lost is counted, and the next ones may cost what was won, and a small part of all time.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Offer:
    """What a draft has for the next step: guesses that are right at this `rate`, and take `draft_seconds` each."""

    rate: float
    draft_seconds: float = 0.0


def tokens_per_second(times: StepTimes, offer: Offer, count: int) -> float:
    """How fast a text comes, on average, with steps of this many guesses. Some step has to be known."""
    return expected_tokens(offer.rate, count) / (times.of(1) + count * (times.each + offer.draft_seconds))


def num_guesses(times: StepTimes, offer: Offer, *, most: int, most_seconds: float = inf) -> int:
    """How many of these guesses give the most tokens a second; 0 if none do.

    There are `most` at the most, and all of them cost `most_seconds` at the most if they are wrong. Without a known
    step it is 0.
    """
    if not times.is_known or most_seconds <= 0:
        return 0
    each = times.each + offer.draft_seconds
    if each * most > most_seconds:
        most = int(most_seconds / each)
    counts = (0, *(count for count in COUNTS if count < most), most)
    return max(counts, key=lambda count: tokens_per_second(times, offer, count))


def best_offer(
    times: StepTimes, offers: Sequence[Offer], *, most: int, most_seconds: float = inf
) -> tuple[int, int] | None:
    """Which of the offers gives the most tokens a second, by its index, and with how many guesses; None if none does.

    Of two that are as good it is the first. `most` and `most_seconds` are as in `num_guesses`.
    """
    counts = [num_guesses(times, offer, most=most, most_seconds=most_seconds) for offer in offers]
    useful = [index for index, count in enumerate(counts) if count > 0]
    if not useful:
        return None
    best = max(useful, key=lambda index: tokens_per_second(times, offers[index], counts[index]))
    return best, counts[best]


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
