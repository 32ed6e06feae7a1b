"""What servers have computed for the clients of this machine, by week: the source of what these acknowledge.

All clients of a machine share one file, `taken.json`, and change it under a lock. The servers of the machine read it.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shoal.ledgers.table_file import TableFile
from shoal.policy.contribution.credit import counts
from shoal.protocol import MAX_WORK, PeerId

log = logging.getLogger(__name__)

MAX_TAKEN = 4096
"""The rows that are kept: one for each server, week, and identity that acknowledged it. The smallest are dropped."""

Name = Annotated[str, Field(max_length=64)]
Work = Annotated[int, Field(ge=0, lt=MAX_WORK)]
Week = Annotated[int, Field(ge=0, lt=1 << 20)]


class TakenRow(BaseModel):
    """What a `server` computed in a week for clients that acknowledge as `client`, which is empty for temporary keys.

    Work is in millions of parameter-tokens.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    period: Week
    client: Name
    server: PeerId
    work: Work


class TakenTable(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, strict=True)

    rows: Annotated[tuple[TakenRow, ...], Field(max_length=MAX_TAKEN, strict=False)] = ()


class TakenLedger:
    """The ledger in a folder. Its functions do I/O, and are called on threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = TableFile(folder / "taken.json", TakenTable)

    def rows(self, *, now: int) -> tuple[TakenRow, ...]:
        """The rows of the weeks that count in the week `now`."""
        return tuple(row for row in self._file.read().rows if counts(row.period, now=now))

    def given_by(self, *, now: int) -> dict[str, float]:
        """What each server has computed for this machine's clients in the weeks that count."""
        given: dict[str, float] = {}
        for row in self.rows(now=now):
            given[row.server] = given.get(row.server, 0.0) + row.work
        return given

    def add(self, server: str, work: int, *, client: str, now: int) -> int:
        """A server has computed more in the week `now`. Returns the sum of that week for this client and server."""
        with self._locked():
            kept = {(row.period, row.client, row.server): row.work for row in self.rows(now=now)}
            key = (now, client, server)
            kept[key] = total = min(kept.get(key, 0) + work, MAX_WORK - 1)
            largest = sorted(kept.items(), key=lambda item: -item[1])[:MAX_TAKEN]
            rows = tuple(TakenRow(period=p, client=c, server=s, work=w) for (p, c, s), w in largest)
            self._file.write(TakenTable(rows=rows))
        return total

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / "taken.lock").open("w")
        except OSError as error:  # then nothing can be written either, and that is said
            log.debug("no lock: %s", error)
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
