"""Whether other peers can dial this one, judged by those that tried, and whom to ask next."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
    this machine. It saw the peer at the host `seen_at`. `clock_ahead` is by how many seconds its clock is ahead. It
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
    """How others reach this peer, by the latest `reports`. `relayed` are its addresses at the relays that it has."""

    kind: Reachability = Reachability.UNKNOWN
    reports: tuple[DialReport, ...] = ()
    relayed: tuple[str, ...] = ()


def latest(reports: Sequence[DialReport], *, now: float) -> tuple[DialReport, ...]:
    """The latest report of each examiner that still counts, in the order of their times."""
    found = {report.examiner: report for report in sorted(reports, key=lambda each: each.at)}
    return tuple(sorted((each for each in found.values() if each.at > now - REPORT_SECONDS), key=lambda each: each.at))


def is_dialable(reports: Sequence[DialReport]) -> bool | None:
    """Whether others can dial the peer; `None` if no peer has tried.

    Half of the examiners have to come through. Those outside decide if there are any: a neighbor on the LAN comes
    through a router that keeps all others out. One examiner that lies does not decide, unless it is the only one.
    """
    outside = [each for each in reports if each.is_outside]
    asked = outside or list(reports)
    if not asked:
        return None
    return 2 * sum(bool(each.reached) for each in asked) >= len(asked)


def judged(reports: Sequence[DialReport], relayed: Sequence[str], *, has_named_relays: bool) -> Reach:
    """How others reach the peer. One that was given relays by its operator counts as one that cannot be dialled."""
    dialable = False if has_named_relays else is_dialable(reports)
    if dialable is None:
        kind = Reachability.UNKNOWN
    elif dialable:
        kind = Reachability.DIRECT
    else:
        kind = Reachability.RELAYED if relayed else Reachability.UNREACHABLE
    return Reach(kind, tuple(reports), tuple(relayed))


def choose_examiners(
    known: Mapping[str, bool], reports: Sequence[DialReport], rng: random.Random, *, most: int = EXAMINERS
) -> list[str]:
    """Whom to ask next, of the peers `known` (by peer id: whether each is outside of this machine's networks).

    Those outside come first, and of these such as have not reported yet: many opinions are better than one.
    """
    reported = {each.examiner for each in reports}
    shuffled = rng.sample(sorted(known), len(known))
    return sorted(shuffled, key=lambda peer: (not known[peer], peer in reported))[:most]


def wants_relays(reach: Reach, *, has_named_relays: bool) -> bool:
    """Whether the peer should have places at relays."""
    return has_named_relays or is_dialable(reach.reports) is False


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
