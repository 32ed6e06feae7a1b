"""What servers report of their shards, checked against what this peer reads itself: the source of histograms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shoal.net.catalog import Catalog
from shoal.peers import ServerInfo
from shoal.policy.census.histogram import Histogram, Tally, agrees, assemble, histogram_of, middle, tally_of
from shoal.policy.census.levels import Shard, num_buckets, reporters

KEPT_SECONDS = 300.0
"""How long reports count after they have expired: reading those of all buckets takes some minutes."""
JUST_READ = 120.0
"""Seconds within which what this peer read itself is better than a report, and its records have not expired."""
DISTRUST_SECONDS = 1800.0
"""How long a peer is not believed whose report contradicted what was read in its shard."""


@dataclass(frozen=True)
class Report:
    """A tally of a shard, by one of its servers, until it expires."""

    peer: str
    shard: Shard
    tally: Tally
    expires: float


class TallyBook:
    """The reports of one model. All times are Unix times."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._reports: dict[int, tuple[Report, ...]] = {}  # by bucket
        self._distrusted: dict[str, float] = {}  # until when, by peer
        self._last_read: dict[int, float] = {}  # by bucket

    def plan(self, *, most: int) -> tuple[int, ...]:
        """The buckets whose reports are to be read next, at most `most`: those first that were not read longest."""
        buckets = range(num_buckets(self._num_blocks))
        return tuple(sorted(buckets, key=lambda each: self._last_read.get(each, -1.0))[: max(most, 1)])

    def take(self, bucket: int, found: Iterable[Report], *, now: float) -> None:
        """Add what was read of a bucket."""
        latest = {(each.peer, each.shard): each for each in (*self._reports.get(bucket, ()), *found)}
        self._reports[bucket] = tuple(each for each in latest.values() if each.expires > now - KEPT_SECONDS)
        self._last_read[bucket] = now

    def check(self, shard: Shard, servers: Sequence[ServerInfo], *, now: float) -> None:
        """Stop believing those whose reports contradict the servers that were just read in a shard."""
        reports = [report for report in self._reports.get(shard.bucket, ()) if report.shard == shard]
        seen = tally_of(servers, now=now) if reports else ()
        for report in reports:
            if not agrees(report.tally, seen):
                self._distrusted[report.peer] = now + DISTRUST_SECONDS

    def histogram(self, catalog: Catalog, *, now: float) -> Histogram:
        """That of all servers: exact if the catalog has them all, otherwise from reports and from what was read."""
        if catalog.is_small(now):
            return histogram_of(catalog.servers(now=now), now=now)
        self._distrusted = {peer: until for peer, until in self._distrusted.items() if until > now}
        tallies: dict[int, dict[int, Tally]] = {}
        num_shards: dict[int, float] = {}
        for bucket in range(num_buckets(self._num_blocks)):
            level = catalog.level_read(bucket, now=now)
            num_shards[bucket] = 1 << level
            # What this peer has just read counts most, then reports, then what it read a while ago.
            tallies[bucket] = _tallies(catalog.shards_read(bucket, now=now), now)
            tallies[bucket] |= self._reported(bucket, level, now)
            tallies[bucket] |= _tallies(catalog.shards_read(bucket, now=now, within=JUST_READ), now)
            if not tallies[bucket]:  # only a sample is known, for example that of the front
                servers = catalog.in_bucket(bucket, now=now)
                tallies[bucket] = {0: tally_of(servers, now=now)} if servers else {}
                num_shards[bucket] = (catalog.num_servers(bucket, now=now) or 0.0) / max(len(servers), 1)
        return assemble(tallies, num_shards=num_shards)

    def _reported(self, bucket: int, level: int, now: float) -> dict[int, Tally]:
        """By index, what most reporters of each shard agree on."""
        shards: dict[Shard, dict[str, Tally]] = {}
        for report in self._reports.get(bucket, ()):
            if (
                report.shard.level == level
                and report.expires > now - KEPT_SECONDS
                and report.peer not in self._distrusted
            ):
                shards.setdefault(report.shard, {})[report.peer] = report.tally
        return {
            shard.index: middle([tallies[peer] for peer in reporters(tallies, now=now)])
            for shard, tallies in shards.items()
        }


def _tallies(shards: Mapping[Shard, Sequence[ServerInfo]], now: float) -> dict[int, Tally]:
    """The tallies of shards that were read, by index."""
    return {shard.index: tally_of(servers, now=now) for shard, servers in shards.items()}
