"""How long a step takes by its number of tokens: a line through what was measured lately.

    seconds(n)  =  seconds(1) + each × (n - 1)

Far away, a step is mostly travel and `each` is small; on one machine it is mostly compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FORGETTING = 0.97
"""What a measurement counts after the next one."""
EACH_PRIOR = 0.05
"""What one more token is expected to cost before it was measured, as a part of a step of one token."""
PRIOR_WEIGHT = 2.0
"""How much that counts: as much as two measured steps of two tokens."""
LARGEST_SURPRISE = 2.0
"""How many times the expected time counts at most: a server that is replaced says nothing about the next step."""


@dataclass(frozen=True)
class StepTimes:
    """Weighted sums over the measured steps: of 1, n - 1, seconds, (n - 1)², and (n - 1) × seconds."""

    weight: float = 0.0
    more: float = 0.0
    seconds: float = 0.0
    more_squared: float = 0.0
    more_seconds: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether any step was measured."""
        return self.weight > 0

    @property
    def each(self) -> float:
        """Seconds that one more token costs; never less than nothing. Some step has to be known."""
        mean_more, mean_seconds = self.more / self.weight, self.seconds / self.weight
        expected = EACH_PRIOR * mean_seconds / (1 + EACH_PRIOR * mean_more)
        spread = self.more_squared - mean_more * self.more
        together = self.more_seconds - mean_more * self.seconds
        return max(0.0, together + PRIOR_WEIGHT * expected) / (max(0.0, spread) + PRIOR_WEIGHT)

    def of(self, num_tokens: int) -> float:
        """The seconds of a step of this many tokens. Some step has to be known."""
        return max(0.0, (self.seconds - self.each * self.more) / self.weight) + self.each * (num_tokens - 1)

    def after(self, num_tokens: int, seconds: float) -> StepTimes:
        """After a step of this many tokens took so long."""
        if self.is_known:
            seconds = min(seconds, LARGEST_SURPRISE * self.of(num_tokens))
        more = num_tokens - 1
        return replace(
            self,
            weight=FORGETTING * self.weight + 1,
            more=FORGETTING * self.more + more,
            seconds=FORGETTING * self.seconds + seconds,
            more_squared=FORGETTING * self.more_squared + more * more,
            more_seconds=FORGETTING * self.more_seconds + more * seconds,
        )
