"""Which blocks a server takes."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.spans import Span

CACHE_SHARE = 0.2
"""The part of a server's memory that is kept for sessions' caches when it chooses how many blocks to hold."""


def choose_num_blocks(memory: int, block_bytes: Sequence[int]) -> int:
    """How many blocks fit into `memory` bytes together with the caches of those who use them; 0 if none does.

    Any window may be chosen afterwards, so the largest blocks are counted.
    """
    room = memory * (1 - CACHE_SHARE)
    largest = sorted(block_bytes, reverse=True)
    num_blocks = 0
    while num_blocks < len(largest) and largest[num_blocks] <= room:
        room -= largest[num_blocks]
        num_blocks += 1
    return num_blocks


def choose_span(throughput: Sequence[float], *, num_blocks: int) -> Span:
    """Where `num_blocks` more blocks help the swarm's weakest ones most (arXiv 2312.08361, appendix D)."""
    starts = range(len(throughput) - num_blocks + 1)
    start = min(starts, key=lambda s: sorted(throughput[s : s + num_blocks]))
    return Span(start, start + num_blocks)
