"""Whether this machine's clock is wrong, by what other machines say the time is.

Records of the directory are valid for about a minute. With a clock that is minutes off, a peer takes all records for
expired or not yet valid, and other peers refuse its own. So the swarm looks empty, and the peer is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

TOLERATED_SECONDS = 5.0
"""Clocks that differ by less count as equal: the time between question and answer is in it too."""
USABLE_SECONDS = 30.0
"""With a greater difference, records expire before they are renewed."""


@dataclass(frozen=True)
class ClockError:
    """This machine's clock is `seconds` ahead of that of `num_members` others, which agree; negative: behind."""

    seconds: float
    num_members: int

    @property
    def is_usable(self) -> bool:
        """Whether a peer can be a member with it."""
        return abs(self.seconds) <= USABLE_SECONDS

    def __str__(self) -> str:
        direction = "ahead of" if self.seconds > 0 else "behind"
        members = "the member that answers" if self.num_members == 1 else f"{self.num_members} members"
        return f"this machine's clock is {_duration(abs(self.seconds))} {direction} that of {members}"

    @property
    def hint(self) -> str:
        """What to do about it."""
        if self.num_members == 1:
            return "set the one that is wrong: `timedatectl` shows and sets the clock"
        return "set the clock: `timedatectl set-ntp true` lets the network do it"


def clock_error(ahead: Sequence[float]) -> ClockError | None:
    """What is wrong with this machine's clock; None if it agrees with at least half of the others.

    `ahead`: for each of the others that answered, by how many seconds this clock is ahead of its own.
    """
    differ = [seconds for seconds in ahead if abs(seconds) > TOLERATED_SECONDS]
    if 2 * len(differ) <= len(ahead):
        return None
    middle = median(differ)
    agree = [seconds for seconds in differ if abs(seconds - middle) <= TOLERATED_SECONDS]
    return ClockError(middle, len(agree)) if 2 * len(agree) > len(ahead) else None


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
