"""A peer's part in the directory, the same on every network: what it reads and when, and how it publishes itself.

It keeps within an allowance of bytes: a small swarm is read whole as often as its callers ask, a large one a few shards
at a time. In between, what was read is the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from shoal.net.catalog import MOST_SHARDS, Catalog, Listing
from shoal.net.tally_book import Report, TallyBook
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.census.allowance import Allowance
from shoal.policy.census.histogram import Histogram, Tally, tally_of
from shoal.policy.census.levels import Shard, bucket_of, reporters, shard_of, stretch

if TYPE_CHECKING:
    import random

log = logging.getLogger(__name__)

CLIENT_BYTES, SERVER_BYTES = 1_800_000, 600_000
"""What a client and a server may read of servers in a minute, all that the directory sends them included."""
TALLY_BYTES = 200_000, 400_000
"""The same for tallies."""
RECORD_BYTES = 1_000
"""The size of a record, roughly: it decides how large a swarm may be that a peer still reads whole."""
MOST_SAMPLED = 16
"""The shards of one read of a large swarm, if the allowance permits them."""
OFTEN = 3
"""A read that costs less than one part in this many of a minute's bytes is allowed whenever a caller asks."""
ROUNDS = 3
"""The reads until a small swarm is complete: the first shows which others are needed."""
FRESH_SECONDS = 1.0
"""Servers that were read within this time need not be read again for a histogram."""
RENEWED = 3
"""A record that says nothing new is renewed after this part of its lifetime."""


class Table(Protocol):
    """What a network offers: keys of the directory, and the number of bytes that came so far."""

    @property
    def bytes_received(self) -> int:
        """All bytes that the directory has sent this peer."""
        ...

    async def read(self, model: ModelInfo, shards: Sequence[Shard]) -> Mapping[Shard, Sequence[Listing]]:
        """The valid announcements in shards, without those shards that could not be read. Raises `SwarmError`."""
        ...

    async def read_tallies(self, model: ModelInfo, buckets: Sequence[int]) -> Mapping[int, Sequence[Report]]:
        """The valid reports of buckets. Raises `SwarmError`."""
        ...


@dataclass(frozen=True)
class Publication:
    """A record of this peer: what it says, its level, when it was published, and for how many seconds."""

    info: ServerInfo
    level: int
    at: float
    lifetime: float

    def says(self, info: ServerInfo) -> bool:
        """Whether it still describes the server, but for what changes all the time, which is asked directly."""
        return _lasting(self.info) == _lasting(info)


def _lasting(info: ServerInfo) -> ServerInfo:
    return replace(
        info,
        queue_length=0,
        cache_tokens_left=0,
        round_trips=(),
        unreached=(),
        decode_speed=None,
        prefill_speed=None,
        capacity=None,
    )


@dataclass
class _Model:
    """What this peer knows of one model."""

    catalog: Catalog
    book: TallyBook
    published: Publication | None = None
    last_bytes: int = 0
    read_at: float = float("-inf")


class Participant:
    """Reads a table within the allowance of a client or a server. `clock` gives the times of the records."""

    def __init__(self, table: Table, *, clock: Callable[[], float], rng: random.Random, is_client: bool) -> None:
        self._table = table
        self._clock = clock
        self._rng = rng
        self._per_minute = CLIENT_BYTES if is_client else SERVER_BYTES
        self._allowance = Allowance.full(self._per_minute)
        self._tally_allowance = Allowance.full(TALLY_BYTES[0 if is_client else 1])
        self._shard_bytes = 64.0 * RECORD_BYTES
        self._tally_bytes = 64.0 * RECORD_BYTES
        self._models: dict[str, _Model] = {}

    def _model(self, model: ModelInfo) -> _Model:
        if model.key not in self._models:
            most_whole = self._per_minute // RECORD_BYTES * 2 // 3
            catalog = Catalog(model.num_blocks, self._rng, most_whole=most_whole)
            self._models[model.key] = _Model(catalog, TallyBook(model.num_blocks))
        return self._models[model.key]

    # -- reading ------------------------------------------------------------------------------------------------------

    def num_known(self, model: ModelInfo) -> int:
        """How many servers of a model this peer has read about."""
        return self._model(model).catalog.num_known

    async def servers(self, model: ModelInfo, blocks: Collection[int] = ()) -> tuple[ServerInfo, ...]:
        """The servers of a model that this peer knows, after a read if the allowance permits one.

        It also searches for more holders of `blocks`. Raises `SwarmError`.
        """
        known, catalog = self._model(model), self._model(model).catalog
        if self._may_read(known):
            for _ in range(ROUNDS):
                most = int(self._allowance.left(now=self._clock()) / self._shard_bytes)
                await self._read(model, catalog.plan(now=self._clock(), most=min(most, MOST_SAMPLED)))
                if not catalog.is_behind(self._clock()):
                    break
        if blocks and not catalog.is_small(self._clock()):
            for shards in catalog.search(blocks, now=self._clock()):
                if not self._allowance.allows(now=self._clock(), urgent=True):
                    break
                await self._read(model, shards)
        return catalog.servers(now=self._clock())

    def _may_read(self, known: _Model) -> bool:
        is_cheap = known.catalog.is_small(self._clock()) and known.last_bytes * OFTEN <= self._per_minute
        return is_cheap or self._allowance.allows(now=self._clock())

    async def _read(self, model: ModelInfo, shards: Sequence[Shard]) -> None:
        known, before = self._model(model), self._table.bytes_received
        found = await self._table.read(model, shards)
        now = self._clock()
        num_bytes = max(self._table.bytes_received - before, 0)
        self._allowance = self._allowance.spent(num_bytes, now=now)
        known.last_bytes, known.read_at = num_bytes, now
        self._shard_bytes += (num_bytes / max(len(shards), 1) - self._shard_bytes) / 2
        known.catalog.take(found, now=now)
        for shard, listings in found.items():
            known.book.check(shard, [each.info for each in listings if each.expires > now], now=now)

    async def histogram(self, model: ModelInfo) -> Histogram:
        """How many servers hold which spans. Raises `SwarmError`."""
        known = self._model(model)
        if self._clock() > known.read_at + FRESH_SECONDS:
            await self.servers(model)
        now = self._clock()
        if not known.catalog.is_small(now) and self._tally_allowance.allows(now=now):
            before = self._table.bytes_received
            most = min(int(self._tally_allowance.left(now=now) / self._tally_bytes), MOST_SHARDS)
            buckets = known.book.plan(most=most)
            reports = await self._table.read_tallies(model, buckets)
            num_bytes = max(self._table.bytes_received - before, 0)
            self._tally_allowance = self._tally_allowance.spent(num_bytes, now=now)
            self._tally_bytes += (num_bytes / len(buckets) - self._tally_bytes) / 2
            for bucket, each in reports.items():
                known.book.take(bucket, each, now=now)
        return known.book.histogram(known.catalog, now=self._clock())

    # -- publishing ---------------------------------------------------------------------------------------------------

    def next_publication(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> Publication | None:
        """The record to publish now; `None` if the one that is published says the same and is valid for long enough.

        In a large swarm it is valid for longer than `lifetime`, because peers read less often.
        """
        known, now = self._model(model), self._clock()
        last, start = known.published, info.span.start
        is_here = last is not None and bucket_of(last.info.span.start) == bucket_of(start)
        level = known.catalog.writing_level(start, last.level if last is not None and is_here else None, now=now)
        longer = min(lifetime * stretch(known.catalog.total(now)), MAX_LIFETIME)
        if (
            last is not None
            and (last.level, longer > lifetime) == (level, True)
            and last.says(info)
            and now < last.at + last.lifetime / RENEWED
        ):
            return None
        return Publication(info, level, now, longer)

    def published(self, model: ModelInfo, publication: Publication) -> None:
        """The record was stored."""
        self._model(model).published = publication

    def spent(self, num_bytes: int) -> None:
        """Publishing cost this many bytes, which count as if they had been read."""
        self._allowance = self._allowance.spent(max(num_bytes, 0), now=self._clock())

    async def report(self, model: ModelInfo, info: ServerInfo) -> tuple[Shard, Tally] | None:
        """The tally of the server's own shard, if the swarm is large and it is the server's turn to publish it.

        Raises `SwarmError`.
        """
        catalog, bucket = self._model(model).catalog, bucket_of(info.span.start)
        shard = shard_of(info.peer, bucket, catalog.level_read(bucket, now=self._clock()))
        if catalog.is_small(self._clock()) or not self._allowance.allows(now=self._clock()):
            return None
        await self._read(model, [shard])
        servers = catalog.shards_read(bucket, now=self._clock()).get(shard, [])
        if info.peer not in reporters([each.peer for each in servers], now=self._clock()):
            return None
        return shard, tally_of(servers, now=self._clock())
