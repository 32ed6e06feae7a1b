"""Where a record is kept in the directory, so that no key grows with the swarm.

    model
      bucket 0: spans that start in blocks 0:8         level 0:  one shard, the front        ████████
      bucket 1: spans that start in blocks 8:16        level 1:  two shards                  ████ ████
      ...                                              level 2:  four shards                 ██ ██ ██ ██

The digest of a peer decides its shard at every level. A server publishes at the level that suits the number of servers
in its bucket, and one level below, so that a reader of level n sees all servers that publish at n or n + 1. A few also
publish in the front. There a reader that knows nothing yet finds a random sample, and learns the level from it. At
level 0 all of this is one key with all servers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

BLOCKS_PER_BUCKET = 8
"""The blocks whose spans share a bucket: fewer mean more keys for a reader, more mean longer keys."""
MAX_LEVEL = 8
"""256 shards: enough for 16,000 servers in one bucket."""
FEWEST, USUAL, MOST = 16, 48, 64
"""Servers of a shard. Beyond these limits its servers change their level; the wide range keeps them from changing to
and fro."""
PROMPT = 80
"""Up to this many servers, all peers can afford to read all records every 20 seconds."""
LONGEST_STRETCH = 5.0
"""Records in larger swarms are valid for up to this many times longer, and are renewed and read as much less often."""


@dataclass(frozen=True, order=True)
class Shard:
    """One of the `2**level` parts of a bucket. Each is a key of the directory."""

    bucket: int
    level: int
    index: int


def bucket_of(start: int) -> int:
    """The bucket of the spans that start at this block."""
    return start // BLOCKS_PER_BUCKET


def num_buckets(num_blocks: int) -> int:
    """The number of buckets of a model."""
    return -(-num_blocks // BLOCKS_PER_BUCKET)


@lru_cache(maxsize=1 << 15)
def _digest(peer: str) -> bytes:
    return hashlib.sha256(peer.encode()).digest()


def shard_of(peer: str, bucket: int, level: int) -> Shard:
    """The shard of a peer at one level. Its shard at the next level is one of the two halves of this one."""
    return Shard(bucket, level, _digest(peer)[0] >> (8 - level))


def shards_at(bucket: int, level: int) -> tuple[Shard, ...]:
    """All shards of a bucket at one level."""
    return tuple(Shard(bucket, level, index) for index in range(1 << level))


def is_sampled(peer: str, level: int) -> bool:
    """Whether a peer is one of those that stand for `2**level` others, by another part of its digest."""
    return int.from_bytes(_digest(peer)[2:4]) % (1 << level) == 0


def shards_of(peer: str, start: int, level: int) -> tuple[Shard, ...]:
    """Where a server publishes whose span starts at this block: at its level, one below, and perhaps in the front."""
    below = max(level - 1, 0)
    levels = {level, below} | ({0} if is_sampled(peer, below) else set())
    return tuple(shard_of(peer, bucket_of(start), each) for each in sorted(levels, reverse=True))


def level_for(count: float, current: int | None) -> int:
    """The level at which a server publishes if its bucket has about `count` servers.

    It stays at its `current` level while the shards there are neither too full nor too empty; `None` is the level of a
    server that knows no other.
    """
    if current is not None:
        least = FEWEST << current if current else 0
        most = MOST << current if current < MAX_LEVEL else math.inf
        if least <= count <= most:
            return current
    elif count <= MOST:
        return 0
    return min(max(math.ceil(math.log2(max(count, 1) / USUAL)), 0), MAX_LEVEL)


def reading_level(votes: Mapping[int, int], refuted: Collection[int] = ()) -> int:
    """The level at which a reader finds most servers: it sees those that publish there and one level above.

    `votes` counts the servers of a bucket that are known, by the level at which they publish. Levels whose shards
    turned out to be empty are `refuted`.
    """
    levels = [level for level in range(MAX_LEVEL + 1) if level not in refuted or level == 0]
    return min(levels, key=lambda level: (-(votes.get(level, 0) + votes.get(level + 1, 0)), level))


def stretch(num_servers: float) -> float:
    """By what factor a record is valid for longer in a swarm of this size: peers read it less often."""
    return min(max(num_servers / PROMPT, 1.0), LONGEST_STRETCH)


NUM_REPORTERS = 3
"""Servers of a shard that publish its tally: the middle of three is true if two are."""
REPORT_SECONDS = 600.0
"""After this time it is the turn of others, so that no server reports on its shard for long."""


def reporters(peers: Collection[str], *, now: float) -> list[str]:
    """Those of a shard's peers whose turn it is to publish its tally. `now` is the Unix time."""
    turn = int(now // REPORT_SECONDS)
    return sorted(peers, key=lambda peer: hashlib.sha256(f"{turn} {peer}".encode()).digest())[:NUM_REPORTERS]
