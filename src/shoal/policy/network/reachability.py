"""Whether other peers can dial this one, judged by those that tried, and whom to ask next."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

EXAMINERS = 3
"""The peers that are asked at a time to dial this one back."""
REPORT_SECONDS = 900.0
"""How long the report of one peer counts."""
WANTED_RELAYS = 3
"""The relays of a peer that cannot be dialled: two may go at a time."""
MIN_RELAYED_BYTES = 64 << 20
"""The bytes that a relay has to carry at least for one connection. libp2p's own relays carry 128 KiB."""
WINDOW_SECONDS = 60.0
"""The time in which the requests below may be answered."""
PEER_REQUESTS = 6
"""The requests of one peer to be dialled back that are answered within the window."""
ALL_REQUESTS = 60
"""The requests of all peers that are answered within the window."""


class Reachability(StrEnum):
    """How others reach a peer."""

    UNKNOWN = "unknown"  # no peer has tried
    DIRECT = "direct"
    RELAYED = "relayed"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class DialReport:
    """What the peer `examiner` found when it dialled this one at the addresses `dialled`: it came through at `reached`.

    `at` is the time of the report, on the clock of the event loop. An examiner that `is_outside` is not in a network of
    this machine. It saw the peer at the address `seen_at`. `clock_ahead` is by how many seconds its clock is ahead. It
    carries the streams of others if it `offers_relay`.
    """

    examiner: str
    at: float
    dialled: tuple[str, ...]
    reached: tuple[str, ...]
    is_outside: bool
    seen_at: str | None = None
    clock_ahead: float = 0.0
    offers_relay: bool = False


@dataclass(frozen=True)
class Reach:
    """How others reach this peer, by the latest `reports`. `relayed` are its addresses at the relays that it has.

    `refused` says for each relay that was tried in vain why it is not used.
    """

    kind: Reachability = Reachability.UNKNOWN
    reports: tuple[DialReport, ...] = ()
    relayed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def latest(reports: Sequence[DialReport]) -> tuple[DialReport, ...]:
    """The latest report of each examiner, in the order of their times, without those that are much older than the last.

    While no examiner answers, the old reports count.
    """
    found = {report.examiner: report for report in sorted(reports, key=lambda each: each.at)}
    newest = max((each.at for each in found.values()), default=0.0)
    return tuple(
        sorted((each for each in found.values() if each.at > newest - REPORT_SECONDS), key=lambda each: each.at)
    )


def comes_through(reports: Sequence[DialReport]) -> bool | None:
    """Whether at least half of these examiners came through; `None` without any.

    One that lies does not decide, unless there is no other.
    """
    return 2 * sum(bool(each.reached) for each in reports) >= len(reports) if reports else None


def wants_relays(reports: Sequence[DialReport]) -> bool:
    """Whether a peer with these reports should have places at relays.

    Those outside of its networks decide if there are any: a neighbor comes through a router that keeps others out.
    """
    outside = [each for each in reports if each.is_outside]
    return comes_through(outside or reports) is False


def judged(
    reports: Sequence[DialReport],
    relayed: Sequence[str],
    *,
    has_named_relays: bool,
    refused: Sequence[str] = (),
) -> Reach:
    """How others reach the peer. One that was given relays by its operator counts as one that cannot be dialled.

    If neighbors come through, a single examiner outside does not make the peer unreachable for them.
    """
    if not has_named_relays and not reports:
        kind = Reachability.UNKNOWN
    elif not has_named_relays and not wants_relays(reports):
        kind = Reachability.DIRECT
    elif relayed:
        kind = Reachability.RELAYED
    else:
        outside = [each for each in reports if each.is_outside]
        is_near = comes_through([each for each in reports if not each.is_outside])
        kind = Reachability.DIRECT if is_near and len(outside) < 2 else Reachability.UNREACHABLE
    return Reach(kind, tuple(reports), tuple(relayed), tuple(refused))


def by_other_machines(reach: Reach, here: Collection[str], *, has_named_relays: bool) -> Reach:
    """The same, as other machines see it: that the peers `here`, on this one, come through proves nothing.

    Where even these do not come through, that counts.
    """
    reports = [each for each in reach.reports if each.examiner not in here or not each.reached]
    return judged(reports, reach.relayed, has_named_relays=has_named_relays, refused=reach.refused)


def choose_examiners(
    known: Mapping[str, bool], asked_at: Mapping[str, float], rng: random.Random, *, most: int = EXAMINERS
) -> list[str]:
    """Whom to ask next, of the peers `known` (by peer id: whether each is outside of this machine's networks).

    Those come first that were not asked for longest (`asked_at`, whether or not they answered), and of those that were
    never asked the ones outside.
    """
    shuffled = rng.sample(sorted(known), len(known))
    return sorted(shuffled, key=lambda peer: (asked_at.get(peer, float("-inf")), not known[peer]))[:most]


@dataclass(frozen=True)
class DialAllowance:
    """The requests to dial peers back that were answered within the window: when, and of which peer."""

    answered: tuple[tuple[float, str], ...] = ()

    def grant(self, peer: str, *, now: float) -> DialAllowance | None:
        """With one more request of this peer; `None` if that is too many."""
        recent = tuple(each for each in self.answered if each[0] > now - WINDOW_SECONDS)
        if len(recent) >= ALL_REQUESTS or sum(each == peer for _, each in recent) >= PEER_REQUESTS:
            return None
        return DialAllowance((*recent, (now, peer)))
