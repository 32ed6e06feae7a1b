"""What a server has computed for others: the acknowledgements that it holds, and what it computed for whom itself.

Each server of a machine has a file of its own, `given-PEER.json`, and is its only writer. The clients of the machine
read it, to present what it holds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shoal.ledgers.table_file import TableFile
from shoal.policy.contribution.credit import NUM_PERIODS, counts
from shoal.protocol import MAX_PRESENTED, Acknowledgement, PeerId

log = logging.getLogger(__name__)

MAX_HELD = 4096
"""The acknowledgements that a server keeps, and the accounts whose use it remembers.

Those are dropped first for which it has computed least itself: an invented number keeps no place."""

Amount = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]


class HeldRow(BaseModel):
    """The newest acknowledgement of a client for a week, and what the server has `computed` for it by its own count."""

    model_config = ConfigDict(frozen=True, strict=True)

    acknowledgement: Acknowledgement
    computed: Amount


class ConsumedRow(BaseModel):
    """What a server computed in a week for clients that act for an `account`."""

    model_config = ConfigDict(frozen=True, strict=True)

    account: PeerId
    period: Annotated[int, Field(ge=0, lt=1 << 20)]
    work: Amount


class GivenTable(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, strict=True)

    held: Annotated[tuple[HeldRow, ...], Field(max_length=MAX_HELD, strict=False)] = ()
    consumed: Annotated[tuple[ConsumedRow, ...], Field(max_length=NUM_PERIODS * MAX_HELD, strict=False)] = ()


Contents = tuple[tuple[HeldRow, ...], dict[str, dict[int, float]]]
"""What a server holds, and what it computed for accounts by week."""


def given_file(folder: Path, peer: str) -> TableFile[GivenTable]:
    """The file of a server."""
    return TableFile(folder / f"given-{peer}.json", GivenTable)


class GivenLedger:
    """The ledger of the server `peer`, in memory. `load` and `save` do I/O, and are called on threads."""

    def __init__(self, folder: Path, peer: str) -> None:
        self.has_changed = False
        self._peer = peer
        self._file = given_file(folder, peer)
        self._held: dict[tuple[str, int], HeldRow] = {}  # by client and week
        self._consumed: dict[str, dict[int, float]] = {}  # by account, then by week

    def load(self) -> None:
        """Begin with what the file has."""
        table = self._file.read()
        for row in table.held:
            if row.acknowledgement.server == self._peer:
                self._held[row.acknowledgement.client, row.acknowledgement.period] = row
        for consumed in table.consumed:
            self._consumed.setdefault(consumed.account, {})[consumed.period] = consumed.work

    def copy(self) -> Contents:
        """What `save` writes: a copy, which is made quickly."""
        self.has_changed = False
        return tuple(self._held.values()), {account: dict(weeks) for account, weeks in self._consumed.items()}

    def save(self, contents: Contents) -> None:
        """Write what `copy` returned."""
        held, consumed = contents
        rows = tuple(
            ConsumedRow(account=account, period=period, work=work)
            for account, weeks in consumed.items()
            for period, work in weeks.items()
        )
        self._file.write(GivenTable(held=held, consumed=rows))

    def take(self, statement: Acknowledgement, computed: float, *, now: int) -> None:
        """Keep a genuine acknowledgement if it is the newest of its client and week.

        By its own count, the server has `computed` this much for the client since the last one. Older acknowledgements,
        and copies, change nothing else.
        """
        if statement.server != self._peer or not counts(statement.period, now=now):
            return
        key = (statement.client, statement.period)
        last = self._held.get(key)
        if last is not None:
            computed += last.computed
            if last.acknowledgement.work > statement.work:
                statement = last.acknowledgement
        self._held[key] = HeldRow(acknowledgement=statement, computed=min(computed, 1e18))
        if len(self._held) > MAX_HELD:
            self._held = {each: row for each, row in self._held.items() if counts(each[1], now=now)}
        if len(self._held) > MAX_HELD:
            del self._held[min(self._held, key=lambda each: self._held[each].computed)]
        self.has_changed = True

    def consume(self, account: str, work: float, *, now: int) -> None:
        """The server has computed something for a client that acts for an account."""
        if account not in self._consumed and len(self._consumed) >= MAX_HELD:
            del self._consumed[min(self._consumed, key=lambda each: self.consumed(each, now=now))]
        weeks = self._consumed.get(account, {})
        kept = {period: amount for period, amount in weeks.items() if counts(period, now=now)}
        self._consumed[account] = kept | {now: min(kept.get(now, 0.0) + work, 1e18)}
        self.has_changed = True

    def consumed(self, account: str, *, now: int) -> float:
        """What it has computed for an account in the weeks that count."""
        weeks = self._consumed.get(account, {})
        return sum(work for period, work in weeks.items() if counts(period, now=now))


def held_in(folder: Path, peer: str, *, now: int) -> tuple[HeldRow, ...]:
    """The acknowledgements that the server `peer` of this machine holds, of the weeks that count in the week `now`.

    The largest come first.
    """
    rows = given_file(folder, peer).read().held
    valid = [row for row in rows if row.acknowledgement.server == peer and counts(row.acknowledgement.period, now=now)]
    return tuple(sorted(valid, key=lambda row: -row.acknowledgement.work))


def to_present(folder: Path, peers: tuple[str, ...], *, now: int) -> tuple[Acknowledgement, ...]:
    """The largest acknowledgements that servers of this machine hold, for a client to present."""
    rows = [row for peer in peers for row in held_in(folder, peer, now=now)]
    rows.sort(key=lambda row: -row.acknowledgement.work)
    return tuple(row.acknowledgement for row in rows[:MAX_PRESENTED])
