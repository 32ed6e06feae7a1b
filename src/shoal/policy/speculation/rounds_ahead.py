"""Whether the next guesses leave before the last ones are judged, and how many.

    a round at a time   ──▶ round 1 ──▶ judged ──▶ round 2 ──▶ judged           a trip for each
    ahead               ──▶ round 1 ──▶ judged
                        ────▶ round 2 ──▶ judged                                what is right comes a trip sooner

A round that is ahead counts only if all guesses before it are right. Otherwise its tokens were computed in vain. So it
pays where guesses are nearly always right, and tokens cost little of a trip.
"""

from __future__ import annotations

from math import inf

from shoal.policy.speculation.acceptance import expected_tokens
from shoal.policy.speculation.guess_count import COUNTS, Offer, num_guesses, tokens_per_second
from shoal.policy.speculation.step_times import StepTimes

MOST_ROUNDS = 4
"""How many rounds of one text are on their way at most."""


def tokens_ahead(times: StepTimes, offer: Offer, *, num_assumed: int, most: int, most_seconds: float = inf) -> int:
    """How many tokens to send behind `num_assumed` guesses that are not judged; 0 if none pay.

    There are `most` at the most, and all of them cost `most_seconds` at the most if they are wrong. Without a known
    step it is 0.
    """
    if not times.is_known or most <= 0 or most_seconds <= 0:
        return 0
    each = times.each + offer.draft_seconds
    if each * most > most_seconds:
        most = int(most_seconds / each)
    one_round = num_guesses(times, offer, most=max(COUNTS))
    seconds_a_token = 1 / tokens_per_second(times, offer, one_round)
    chance = offer.rate**num_assumed

    def won(count: int) -> float:
        return chance * (expected_tokens(offer.rate, count) - 1) * seconds_a_token - count * each

    return max((0, *(count for count in COUNTS if count < most), most), key=won)
