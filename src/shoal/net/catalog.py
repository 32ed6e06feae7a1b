"""What a peer has read of the servers of one model, and what it reads next: the same on every network.

Nothing here talks: an implementation of `Directory` asks `plan` which shards to read, reads them, and passes what it
found to `take`. Time and randomness are arguments.

A small swarm is read whole each time, so its catalog is complete. Of a large one, each read takes a few shards in
random order, each of another bucket, and what was read stays until it expires.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from shoal.peers import ServerInfo, ServerState
from shoal.policy.census.levels import (
    FEWEST,
    MAX_LEVEL,
    Shard,
    bucket_of,
    level_for,
    num_buckets,
    reading_level,
    shard_of,
    shards_at,
)

if TYPE_CHECKING:
    import random

MOST_SHARDS = 64
"""The shards of one read: each costs a search in the directory."""
MOST_LISTED = 16_384
"""Servers that are remembered. Those that expire first are forgotten, even if one peer filled the directory."""
COUNTED = 8
"""The latest shards of a bucket from which the number of its servers is estimated."""
RIVAL = 0.05
"""If this part of a bucket is published where a reader does not see it, every second read goes there: at the
right level shards are full, so servers that claim another one are soon outvoted."""
LOOKED_UP = 4
"""Every fourth read of a bucket goes one level higher, where servers appear that have just raised their level."""
COUNT_SECONDS = 600.0
"""How long the number of servers in a shard counts, and for how long a level counts as refuted."""


@dataclass(frozen=True)
class Listing:
    """A server as it was found: what it announces, the level at which it publishes, and when that expires.

    Of two announcements of one peer, the one with the higher `version` is the later.
    """

    info: ServerInfo
    level: int
    expires: float
    version: float


@dataclass(frozen=True)
class _Count:
    """How many servers a shard had at a time."""

    shard: Shard
    number: int
    at: float


class Catalog:
    """The servers of one model that a peer has read about. All times are those of the records.

    A swarm of about `most_whole` servers is read whole; of a larger one, the peer reads a sample.
    """

    def __init__(self, num_blocks: int, rng: random.Random, *, most_whole: int) -> None:
        self._most_whole = most_whole
        self._most_shards = max(MOST_SHARDS, num_buckets(num_blocks))
        self._num_blocks = num_blocks
        self._rng = rng
        self._listings: dict[str, Listing] = {}  # by peer
        self._counts: dict[int, list[_Count]] = {}  # by bucket, the latest last
        self._refuted: dict[tuple[int, int], float] = {}  # until when, by bucket and level
        self._unread: dict[tuple[int, int], list[Shard]] = {}  # what is left of a round, by bucket and level
        self._last_read: dict[int, float] = {}  # by bucket
        self._num_reads: Counter[int] = Counter()  # by bucket
        self._votes: dict[int, Counter[int]] = {}  # by bucket: at which levels its servers publish

    # -- reading ------------------------------------------------------------------------------------------------------

    def plan(self, *, now: float, most: int) -> tuple[Shard, ...]:
        """The shards to read next: all of a small swarm, otherwise at most `most`, and at least one."""
        self._forget(now)
        whole = self._whole(now)
        if self.is_small(now):
            return (*whole, *self._above(now))
        buckets = sorted(range(num_buckets(self._num_blocks)), key=lambda each: self._last_read.get(each, -1.0))
        shards = (self._next_shard(bucket, now) for bucket in islice(cycle(buckets), max(most, 1)))
        return tuple(dict.fromkeys(shards))

    def is_behind(self, now: float) -> bool:
        """Whether a small swarm has shards that were never read: what was read first showed that there are more."""
        counted = {count.shard for counts in self._counts.values() for count in counts}
        return self.is_small(now) and not counted.issuperset(self._whole(now))

    def search(self, blocks: Collection[int], *, now: float) -> Iterator[tuple[Shard, ...]]:
        """What to read to find more holders of these blocks, bucket by bucket: the nearest before a block come first.

        It ends when each block has a holder that was not known before.
        """
        known = set(self._listings)
        for bucket in sorted({bucket_of(block) for block in blocks}, reverse=True):
            for each in range(bucket, -1, -1):
                if not self._lacks(blocks, known, now):
                    return
                yield shards_at(each, self._reading_level(each, now))[:MOST_SHARDS]

    def _lacks(self, blocks: Iterable[int], known: Collection[str], now: float) -> bool:
        """Whether some block has no online holder beside those that were known."""
        new = [server for server in self.servers(now=now) if server.peer not in known]
        spans = [server.span for server in new if server.state is ServerState.ONLINE]
        return any(not any(block in span for span in spans) for block in blocks)

    def take(self, found: Mapping[Shard, Sequence[Listing]], *, now: float) -> None:
        """Add what a read has found. Shards that could not be read are not in `found`."""
        for shard, listings in found.items():
            valid = [listing for listing in listings if listing.expires > now]
            for listing in valid:
                other = self._listings.get(listing.info.peer, listing)
                self._listings[listing.info.peer] = listing if listing.version >= other.version else other
            number = len({listing.info.peer for listing in valid})
            counts = [each for each in self._counts.get(shard.bucket, []) if each.shard != shard]
            self._counts[shard.bucket] = [*counts, _Count(shard, number, now)][-max(COUNTED, 1 << shard.level) :]
            self._last_read[shard.bucket] = now
            self._num_reads[shard.bucket] += 1
            numbers = self._numbers(shard.bucket, shard.level, now)
            is_above = shard.level == self._reading_level(shard.bucket, now) + 1
            if shard.level and not is_above and statistics.median(numbers) < FEWEST / 2:
                self._refuted[shard.bucket, shard.level] = now + COUNT_SECONDS
        self._forget(now)

    def _forget(self, now: float) -> None:
        left = [each for each in self._listings.values() if each.expires > now]
        if len(left) > MOST_LISTED:
            left = sorted(left, key=lambda each: each.expires)[-MOST_LISTED:]
        self._listings = {each.info.peer: each for each in left}
        self._refuted = {key: until for key, until in self._refuted.items() if until > now}
        self._votes = {}
        for each in left:
            self._votes.setdefault(bucket_of(each.info.span.start), Counter())[each.level] += 1

    def _whole(self, now: float) -> tuple[Shard, ...]:
        buckets = range(num_buckets(self._num_blocks))
        return tuple(shard for bucket in buckets for shard in shards_at(bucket, self._reading_level(bucket, now)))

    def _above(self, now: float) -> tuple[Shard, ...]:
        """A random shard one level higher for each bucket that has several shards."""
        levels = ((bucket, self._reading_level(bucket, now)) for bucket in range(num_buckets(self._num_blocks)))
        return tuple(
            Shard(bucket, level + 1, self._rng.randrange(2 << level))
            for bucket, level in levels
            if 0 < level < MAX_LEVEL
        )

    def _next_shard(self, bucket: int, now: float) -> Shard:
        """The next shard in a random order of all shards of a bucket."""
        level = self._reading_level(bucket, now)
        votes = self._votes.get(bucket, Counter())
        others = Counter({each: votes[each] for each in votes if each not in (level, level + 1)})
        if self._num_reads[bucket] % 2 and others.total() > RIVAL * votes.total():
            level = reading_level(others, self._refuted_levels(bucket, now))
        elif self._num_reads[bucket] % LOOKED_UP == 0 and 0 < level < MAX_LEVEL:
            level += 1
        left = self._unread.setdefault((bucket, level), [])
        if not left:
            left.extend(shards_at(bucket, level))
            self._rng.shuffle(left)
        return left.pop()

    def _reading_level(self, bucket: int, now: float) -> int:
        return reading_level(self._votes.get(bucket, Counter()), self._refuted_levels(bucket, now))

    def _refuted_levels(self, bucket: int, now: float) -> set[int]:
        return {level for (each, level), until in self._refuted.items() if each == bucket and until > now}

    # -- numbers ------------------------------------------------------------------------------------------------------

    def _numbers(self, bucket: int, level: int, now: float) -> list[int]:
        """How many servers the shards had that were read lately at a level."""
        counts = self._counts.get(bucket, ())
        return [each.number for each in counts if each.shard.level == level and each.at > now - COUNT_SECONDS]

    def num_servers(self, bucket: int, *, now: float) -> float | None:
        """About how many servers a bucket has; `None` if it was never read."""
        if bucket not in self._last_read:
            return None
        level = self._reading_level(bucket, now)
        numbers = self._numbers(bucket, level, now)
        if not numbers:  # the level has just changed, or only the front was read
            others = [each.number << each.shard.level for each in self._counts[bucket] if each.shard.level]
            if others:
                return float(statistics.median(others))
            votes = self._votes.get(bucket, Counter())
            return float(sum(number << max(each - 1, 0) for each, number in votes.items()))
        # Shards are random parts, so the median is near the mean, and a shard that one peer has filled does not count.
        middle = statistics.median(numbers) if len(numbers) < 1 << level else statistics.mean(numbers)
        return float(middle * (1 << level))

    @property
    def num_known(self) -> int:
        """How many servers the peer has read about."""
        return len(self._listings)

    def total(self, now: float) -> float:
        """About how many servers the model has."""
        return sum(self.num_servers(bucket, now=now) or 0.0 for bucket in range(num_buckets(self._num_blocks)))

    def is_small(self, now: float) -> bool:
        """Whether all servers are read each time."""
        return self.total(now) <= self._most_whole and len(self._whole(now)) <= self._most_shards

    def writing_level(self, start: int, current: int | None, *, now: float) -> int:
        """The level at which a server publishes whose span starts at this block; `current` is its level until now."""
        bucket = bucket_of(start)
        number, votes = self.num_servers(bucket, now=now), self._votes.get(bucket, Counter())
        if number is None:
            return current or 0
        usual = max(votes, key=lambda level: (votes[level], -level), default=0)
        if self._reading_level(bucket, now) and all(each.shard.level == 0 for each in self._counts[bucket]):
            return usual if current is None else current  # the front alone is a poor estimate
        return level_for(number, usual if current is None else current)

    def level_read(self, bucket: int, *, now: float) -> int:
        """The level at which this peer reads a bucket."""
        return self._reading_level(bucket, now)

    # -- servers ------------------------------------------------------------------------------------------------------

    def servers(self, *, now: float) -> tuple[ServerInfo, ...]:
        """The servers whose latest announcements have not expired, sorted by their peer ids.

        An announcement counts until it expires, even if a later read misses it: the peers that store it may answer too
        late while a batch occupies their links.
        """
        return tuple(each.info for _, each in sorted(self._listings.items()) if each.expires > now)

    def in_bucket(self, bucket: int, *, now: float) -> list[ServerInfo]:
        """The known servers of a bucket."""
        return [server for server in self.servers(now=now) if bucket_of(server.span.start) == bucket]

    def shards_read(self, bucket: int, *, now: float, within: float = COUNT_SECONDS) -> dict[Shard, list[ServerInfo]]:
        """The servers of each shard of a bucket that was read in the last `within` seconds, at the level read now."""
        level = self._reading_level(bucket, now)
        counts = self._counts.get(bucket, ())
        found: dict[Shard, list[ServerInfo]] = {
            each.shard: [] for each in counts if each.shard.level == level and each.at > now - within
        }
        for peer, listing in self._listings.items():
            if listing.expires > now and bucket_of(listing.info.span.start) == bucket:
                shard = shard_of(peer, bucket, level)
                if shard in found:
                    found[shard].append(listing.info)
        return found
