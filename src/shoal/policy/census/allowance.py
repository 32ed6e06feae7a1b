"""How many bytes a peer may read from the directory in a minute, however large the swarm is."""

from __future__ import annotations

from dataclasses import dataclass, replace

MINUTE = 60.0
LARGEST_DEBT = 2.0
"""Minutes whose bytes may be spent in advance, where a block is missing. Beyond that the peer waits."""


@dataclass(frozen=True)
class Allowance:
    """`saved` bytes at the time `at`, and `per_minute` more for each minute. At most those of one minute are saved.

    What a read takes is known only afterwards, so `saved` may be negative: then the next read waits.
    """

    per_minute: float
    saved: float
    at: float

    @classmethod
    def full(cls, per_minute: float) -> Allowance:
        """With the bytes of one minute saved, whatever the time is."""
        return cls(per_minute, per_minute, 0.0)

    def left(self, *, now: float) -> float:
        """The bytes that are saved at a time."""
        return min(self.per_minute, self.saved + self.per_minute * max(now - self.at, 0.0) / MINUTE)

    def spent(self, num_bytes: float, *, now: float) -> Allowance:
        """After a read."""
        return replace(self, saved=self.left(now=now) - num_bytes, at=now)

    def allows(self, *, now: float, urgent: bool = False) -> bool:
        """Whether the peer may read now. An `urgent` read may run up a debt."""
        return self.left(now=now) > (-LARGEST_DEBT * self.per_minute if urgent else 0.0)
