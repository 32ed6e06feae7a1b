"""Which upload ends for a peer that waits, where only a few are under way at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SEND_SECONDS = 45.0
"""How long a peer may take for one answer: slower ones would keep others waiting."""
GRACE_SECONDS = 5.0
"""How long an upload may begin slowly: a connection needs some round trips to get up to speed."""


@dataclass(frozen=True)
class Upload:
    """An answer of `num_bytes` bytes on its way, of which the peer has taken `taken` since the time `began`."""

    began: float
    num_bytes: int
    taken: int

    def expected_seconds(self, *, now: float) -> float:
        """How long it takes in all if it goes on as it has begun."""
        return (now - self.began) * self.num_bytes / self.taken if self.taken > 0 else float("inf")


def gives_way(uploads: Sequence[Upload], *, now: float) -> Upload | None:
    """The upload that ends so that another can begin: the slowest, if it would not be done within `SEND_SECONDS`.

    So nothing is lost but time: it would be ended later. Others go on, however many peers wait.
    """
    late = [each for each in uploads if now - each.began >= GRACE_SECONDS]
    slowest = max(late, key=lambda each: each.expected_seconds(now=now), default=None)
    return slowest if slowest is not None and slowest.expected_seconds(now=now) > SEND_SECONDS else None
