"""Which session gives its pages up: decisions only, from a picture of who holds how many and since when it rests.

Pages are shared between peers, not sessions: of the peer that holds most, the session that has been unused for longest
gives way. What is unused for `IDLE_SECONDS` goes first, whichever peer holds it. So sessions that are opened early and
left alone keep no other session out, however many they are.

Two that have room for one only, both at work, end nevertheless: the one that gives way begins again when there is room
for all that it had, and until then the other one goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

IDLE_SECONDS = 30.0
"""A session that nothing was asked of for so long gives way to any other."""
TURN_SECONDS = 30.0
"""A session that is at work has so long at least, before one that has not begun may have its pages."""
PATIENCE_SECONDS = 1.0
"""One that has not begun waits so long for others to end, before it has the pages of one that is at work."""
MANY_TIMES = 2
"""It has them only of a peer that holds more than so many times what its own peer would hold then."""


@dataclass(frozen=True)
class Holder:
    """A session that holds pages: whose it is, when it was asked for something last, and when it began.

    It is `at_work` while it waits for a step. Of two sessions the one `opened` earlier has the smaller number.
    """

    peer: str
    num_pages: int
    used_at: float
    began_at: float
    opened: int
    at_work: bool = False

    def is_idle(self, now: float) -> bool:
        return not self.at_work and now - self.used_at >= IDLE_SECONDS


def gives_way(holders: Sequence[Holder], *, now: float) -> int:
    """Who gives its pages to a session that has begun and cannot go on: an index. There must be a holder."""
    idle = [index for index, holder in enumerate(holders) if holder.is_idle(now)]
    return _of_the_largest(holders, idle or range(len(holders)))


def makes_room(
    holders: Sequence[Holder], *, peer: str, num_pages: int, num_missing: int, waited: float, now: float
) -> int | None:
    """Who gives its pages to a session of a peer that needs so many to begin, of which some are missing, if any does.

    It has waited for so long already.
    """
    idle = [index for index, holder in enumerate(holders) if holder.is_idle(now)]
    if sum(holders[index].num_pages for index in idle) >= num_missing > 0:
        return _of_the_largest(holders, idle)
    if waited < PATIENCE_SECONDS or num_missing <= 0:
        return None
    held = _held(holders)
    at_least = MANY_TIMES * (held[peer] + num_pages)
    have_had_a_turn = [
        index
        for index, holder in enumerate(holders)
        if held[holder.peer] > at_least and now - holder.began_at >= TURN_SECONDS
    ]
    return _of_the_largest(holders, have_had_a_turn) if have_had_a_turn else None


def _of_the_largest(holders: Sequence[Holder], among: Sequence[int]) -> int:
    """Of the peer that holds most, the one that was unused for longest; of equal peers, the one that came last."""
    held, came = _held(holders), dict[str, int]()
    for holder in holders:
        came[holder.peer] = min(holder.opened, came.get(holder.peer, holder.opened))

    def key(index: int) -> tuple[int, int, bool, float, int]:
        holder = holders[index]
        return held[holder.peer], came[holder.peer], not holder.at_work, -holder.used_at, holder.opened

    return max(among, key=key)


def _held(holders: Sequence[Holder]) -> Counter[str]:
    """The pages of each peer."""
    held = Counter[str]()
    for holder in holders:
        held[holder.peer] += holder.num_pages
    return held
