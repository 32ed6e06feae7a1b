"""The directory of a network in memory: a table that all peers share, which each reads as it would read a real one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shoal.errors import SwarmError
from shoal.net.catalog import Listing
from shoal.net.participant import RECORD_BYTES, Participant
from shoal.net.tally_book import Report
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.census.histogram import Histogram
from shoal.policy.census.levels import Shard, shards_of


@dataclass(frozen=True)
class MemoryRecord:
    """One announcement, the loop's time when it expires, its level, and its number among all."""

    model: ModelInfo
    info: ServerInfo
    expires: float
    level: int = 0
    version: int = 0

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The shards that have it."""
        return shards_of(self.info.peer, self.info.span.start, self.level)


class MemoryTable:
    """The announcements and reports of all peers. While it does not answer, reading and writing raise `SwarmError`."""

    def __init__(self) -> None:
        self.answers = True
        self.on_announce: Callable[[ServerInfo], ServerInfo] | None = None
        self._records: dict[tuple[str, str], MemoryRecord] = {}  # by model key and peer
        self._shards: dict[tuple[str, Shard], dict[str, None]] = {}  # the peers of each; some have left it
        self._reports: dict[tuple[str, int], dict[str, Report]] = {}  # by model key and bucket, and peer
        self._num_published = 0

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """The latest announcements, also those that have expired."""
        return tuple(self._records.values())

    def edit(self, edit: Callable[[ServerInfo], ServerInfo]) -> None:
        """Replace each announced info by what `edit` returns for it."""
        for key, record in [*self._records.items()]:
            self._add(key, replace(record, info=edit(record.info)))

    def publish(self, peer: str, model: ModelInfo, info: ServerInfo, expires: float, *, level: int = 0) -> None:
        """Announce `info` until the loop's time is `expires`, at this level."""
        self.check()
        if self.on_announce is not None:
            info = self.on_announce(info)
        self._num_published += 1
        self._add((model.key, peer), MemoryRecord(model, info, expires, level, self._num_published))

    def _add(self, key: tuple[str, str], record: MemoryRecord) -> None:
        self._records[key] = record
        for shard in record.shards:
            self._shards.setdefault((key[0], shard), {})[key[1]] = None

    def announced(self) -> list[MemoryRecord]:
        """The valid announcements, sorted by model key and peer."""
        self.check()
        now = asyncio.get_running_loop().time()
        self._records = {key: record for key, record in self._records.items() if record.expires > now}
        return [self._records[key] for key in sorted(self._records)]

    def in_shard(self, model: ModelInfo, shard: Shard) -> Iterator[MemoryRecord]:
        """The valid announcements in one shard."""
        self.check()
        now = asyncio.get_running_loop().time()
        for peer in [*self._shards.get((model.key, shard), ())]:
            record = self._records.get((model.key, peer))
            if record is not None and record.expires > now and shard in record.shards:
                yield record
            else:
                del self._shards[model.key, shard][peer]

    def report(self, model: ModelInfo, report: Report) -> None:
        """Publish how many servers a shard has."""
        self.check()
        self._reports.setdefault((model.key, report.shard.bucket), {})[report.peer] = report

    def reports(self, model: ModelInfo, bucket: int) -> list[Report]:
        """The valid reports on the shards of a bucket."""
        self.check()
        now = asyncio.get_running_loop().time()
        found = self._reports.get((model.key, bucket), {})
        return [report for _, report in sorted(found.items()) if report.expires > now]

    def check(self) -> None:
        """Raises `SwarmError` if the directory does not answer."""
        if not self.answers:
            raise SwarmError("the directory does not answer")


class MemoryDirectory:
    """`Directory` of one peer. Each record that it reads counts as `RECORD_BYTES`.

    `is_current` tells whether the peer is alive, and was not started again since.
    """

    def __init__(self, table: MemoryTable, peer: str, *, is_client: bool, is_current: Callable[[], bool]) -> None:
        self.bytes_received = 0
        self._table = table
        self._peer = peer
        self._is_current = is_current
        self._participant = Participant(
            self,
            clock=lambda: asyncio.get_running_loop().time(),
            rng=random.Random(f"the directory of {peer}"),  # noqa: S311 - the same in each run
            is_client=is_client,
        )

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        if info.peer != self._peer or not 0 < lifetime <= MAX_LIFETIME:
            raise ValueError("a peer announces itself, for a while")
        if not self._is_current():
            return
        publication = self._participant.next_publication(model, info, lifetime=lifetime)
        if publication is None:
            return
        expires = publication.at + publication.lifetime
        self._table.publish(info.peer, model, info, expires, level=publication.level)
        self._participant.published(model, publication)
        report = None if info.state is ServerState.LEAVING else await self._participant.report(model, info)
        if report is not None:
            self._table.report(model, Report(info.peer, *report, expires))

    async def servers(self, model: ModelInfo, *, blocks: Collection[int] = ()) -> tuple[ServerInfo, ...]:
        return await self._participant.servers(model, blocks)

    async def histogram(self, model: ModelInfo) -> Histogram:
        return await self._participant.histogram(model)

    async def models(self) -> tuple[ModelInfo, ...]:
        return tuple(sorted({record.model for record in self._table.announced()}, key=lambda model: model.key))

    # What a `Participant` asks.

    async def read(self, model: ModelInfo, shards: Sequence[Shard]) -> dict[Shard, list[Listing]]:
        found = {
            shard: [
                Listing(each.info, each.level, each.expires, each.version)
                for each in self._table.in_shard(model, shard)
            ]
            for shard in shards
        }
        self.bytes_received += RECORD_BYTES * sum(map(len, found.values()))
        return found

    async def read_tallies(self, model: ModelInfo, buckets: Sequence[int]) -> dict[int, list[Report]]:
        found = {bucket: self._table.reports(model, bucket) for bucket in buckets}
        self.bytes_received += 2 * RECORD_BYTES * sum(map(len, found.values()))
        return found
