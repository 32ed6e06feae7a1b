"""What a machine has computed for whom, and what others have computed for it, from all of its ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.ledgers.given_ledger import held_in
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.policy.contribution.credit import PERIOD_SECONDS


@dataclass(frozen=True)
class PeerTotal:
    """Work between this machine and one peer, of the weeks that count, in millions of parameter-tokens.

    `given` is what this machine has computed for the peer, as the peer has acknowledged it, `taken` what the peer has
    computed for this machine.
    """

    peer: str
    given: int = 0
    taken: int = 0


@dataclass(frozen=True)
class WeekTotal:
    """The work of a week that begins at the Unix time `begins`."""

    begins: int
    given: int = 0
    taken: int = 0


@dataclass(frozen=True)
class MachineTotals:
    """The work of a machine whose servers are `servers`: by peer, the largest first, and by week, the last first."""

    servers: tuple[str, ...]
    peers: tuple[PeerTotal, ...]
    weeks: tuple[WeekTotal, ...]

    @property
    def given(self) -> int:
        """What this machine has computed for others."""
        return sum(each.given for each in self.peers)

    @property
    def taken(self) -> int:
        """What others have computed for this machine."""
        return sum(each.taken for each in self.peers)


def machine_totals(folder: Path, *, now: int) -> MachineTotals:
    """What the ledgers in a folder say of the weeks that count in the week `now`. Reads files."""
    given: dict[tuple[str, int], int] = {}
    taken: dict[tuple[str, int], int] = {}
    servers = sorted(path.stem.removeprefix("given-") for path in folder.glob("given-*.json"))
    for server in servers:
        for row in held_in(folder, server, now=now):
            statement = row.acknowledgement
            _add(given, statement.client, statement.period, statement.work)
    for entry in TakenLedger(folder).rows(now=now):
        _add(taken, entry.server, entry.period, entry.work)
    names = {peer for peer, _ in (*given, *taken)}
    weeks = {week for _, week in (*given, *taken)}
    peers = [PeerTotal(name, _sum(given, peer=name), _sum(taken, peer=name)) for name in names]
    return MachineTotals(
        tuple(servers),
        tuple(sorted(peers, key=lambda each: (-each.given - each.taken, each.peer))),
        tuple(
            WeekTotal(week * PERIOD_SECONDS, _sum(given, week=week), _sum(taken, week=week))
            for week in sorted(weeks, reverse=True)
        ),
    )


def _add(sums: dict[tuple[str, int], int], peer: str, week: int, work: int) -> None:
    sums[peer, week] = sums.get((peer, week), 0) + work


def _sum(sums: Mapping[tuple[str, int], int], *, peer: str | None = None, week: int | None = None) -> int:
    return sum(work for (name, at), work in sums.items() if peer in (None, name) and week in (None, at))
