"""How many tokens a pass may have on a device whose memory has run out: fewer at first, and more again later."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.policy.batching.engine_limits import Limits

LEAST_TOKENS = 16
"""The fewest tokens to which a pass is limited. A device without memory for these cannot serve at all."""
PASSES_TO_GROW = 64
"""After this many passes without a failure, passes may have twice as many tokens: memory may be free again. If it is
not, one pass in many fails."""


@dataclass(frozen=True)
class PassSize:
    """The tokens of all sessions that a pass may have: `limit` of at most `most`, since `num_passes` passes."""

    most: int
    limit: int
    num_passes: int = 0

    @classmethod
    def unlimited(cls, most: int) -> PassSize:
        """As many tokens as the operator allows."""
        return cls(most, most)

    def applied_to(self, limits: Limits) -> Limits:
        """The operator's limits, with passes of this size."""
        return (
            limits
            if self.limit == limits.max_num_batched_tokens
            else replace(limits, max_num_batched_tokens=self.limit)
        )

    def after_out_of_memory(self, num_tokens: int) -> PassSize:
        """A pass of this many tokens found no memory: the next ones have at most half as many."""
        return PassSize(self.most, min(self.limit, max(LEAST_TOKENS, num_tokens // 2)))

    def after_pass(self) -> PassSize:
        """A pass was computed."""
        if self.limit == self.most:
            return self
        if self.num_passes + 1 < PASSES_TO_GROW:
            return PassSize(self.most, self.limit, self.num_passes + 1)
        return PassSize(self.most, min(self.most, 2 * self.limit))
