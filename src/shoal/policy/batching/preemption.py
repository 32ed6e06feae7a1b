"""Which session is preempted: it gives up its pages to another and is computed again later.

Pages are shared fairly between peers, not between sessions. Of the peer that holds the most pages, the session that has
been unused for longest is preempted. A session that has been idle for `IDLE_SECONDS` is preempted before all others,
whichever peer holds it. So sessions that are opened early and left idle cannot keep other sessions out. A peer with a
weight (`shoal.policy.contribution.priority`) counts as holding its pages divided by that: its sessions give way later.

Two working sessions end even if there is room for one only: the preempted one begins again when there is room for all
its pages, and until then the other goes on. Sessions that wait may hold pages too, those of a prompt that was known.
If no session runs, these do not keep the first one out (`preempted_while_nobody_runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IDLE_SECONDS = 30.0
"""A session without a request for so long is preempted before any that works."""
TURN_SECONDS = 30.0
"""The least time that a working session runs before its pages may go to a session that has not begun."""
PATIENCE_SECONDS = 1.0
"""How long a session that has not begun waits for others to end, before a working session is preempted for it."""
IMBALANCE = 2
"""A working session is preempted for a new one only if its peer holds more than this multiple of the new one's peer."""


@dataclass(frozen=True)
class Holder:
    """A session that holds pages: its peer, the time of its last request, and the time when it began.

    Peers of one network count as one (`shoal.net.addressing.addresses.network_of`): identities are free.

    It is `at_work` while a step of it waits or is computed. `opened` numbers sessions in the order of opening.
    `since` is when its client came: a client that was told to come back keeps its place (`Places`). A session that is
    not `running` was given pages that were known already, and still waits for others. `weight` is its peer's.
    """

    peer: str
    num_pages: int
    used_at: float
    began_at: float
    opened: int
    at_work: bool = False
    since: float = 0.0
    running: bool = True
    weight: float = 1.0

    def is_idle(self, now: float) -> bool:
        """Whether it may be preempted for any other."""
        return not self.at_work and now - self.used_at >= IDLE_SECONDS


def preempted_for_running(holders: Sequence[Holder], *, now: float) -> int:
    """The index of the session to preempt for a running one that cannot go on. There must be a holder."""
    idle = [index for index, holder in enumerate(holders) if holder.is_idle(now)]
    return of_the_largest(holders, idle or range(len(holders)))


def preempted_for_new(
    holders: Sequence[Holder],
    *,
    peer: str,
    num_pages: int,
    num_missing: int,
    waited: float,
    now: float,
    weight: float = 1.0,
) -> int | None:
    """The index of the session to preempt for one that has not begun; None if none is to be preempted now.

    The new session is of `peer`, which has this `weight`; it needs `num_pages`, of which `num_missing` are not free,
    and has `waited`, in seconds.
    """
    idle = [index for index, holder in enumerate(holders) if holder.is_idle(now)]
    if sum(holders[index].num_pages for index in idle) >= num_missing > 0:
        return of_the_largest(holders, idle)
    if waited < PATIENCE_SECONDS or num_missing <= 0:
        return None
    held = _held(holders)
    at_least = IMBALANCE * (held.get(peer, 0.0) + num_pages / weight)
    had_their_turn = [
        index
        for index, holder in enumerate(holders)
        if held[holder.peer] > at_least and now - holder.began_at >= TURN_SECONDS
    ]
    return of_the_largest(holders, had_their_turn) if had_their_turn else None


def preempted_while_nobody_runs(
    holders: Sequence[Holder], *, num_missing: int, waited: float, now: float
) -> int | None:
    """As `preempted_for_new`, when nothing else can be computed: the sessions that hold pages wait, or are idle.

    None of them would end and leave its pages to others. They would be told to come back, and find their pages again,
    for ever.
    """
    if any(holder.running and not holder.is_idle(now) for holder in holders) or waited < PATIENCE_SECONDS:
        return None
    if not sum(holder.num_pages for holder in holders) >= num_missing > 0:
        return None
    return of_the_largest(holders, range(len(holders)))


def of_the_largest(holders: Sequence[Holder], among: Sequence[int]) -> int:
    """Of the peer with the most pages for its weight, the session unused for longest.

    Of equal peers, it is one of the peer that opened its first session last.
    """
    held, first_opened = _held(holders), dict[str, int]()
    for holder in holders:
        first_opened[holder.peer] = min(holder.opened, first_opened.get(holder.peer, holder.opened))

    def key(index: int) -> tuple[float, int, bool, float, int]:
        holder = holders[index]
        return held[holder.peer], first_opened[holder.peer], not holder.at_work, -holder.used_at, holder.opened

    return max(among, key=key)


def _held(holders: Sequence[Holder]) -> dict[str, float]:
    """The number of pages of each peer, divided by its weight."""
    held = dict[str, float]()
    for holder in holders:
        held[holder.peer] = held.get(holder.peer, 0.0) + holder.num_pages / holder.weight
    return held
