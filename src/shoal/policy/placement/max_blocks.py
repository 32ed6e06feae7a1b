"""How many blocks fit into a server's memory."""

from __future__ import annotations

from collections.abc import Sequence

CACHE_SHARE = 0.2
"""The fraction of a server's memory that is reserved for sessions' caches when it chooses how many blocks to hold."""


def choose_num_blocks(memory: int, block_bytes: Sequence[int]) -> int:
    """How many blocks fit into `memory` bytes beside the caches of their sessions; 0 if none does.

    Any span may be chosen afterwards, so the largest blocks are counted.
    """
    room = memory * (1 - CACHE_SHARE)
    largest = sorted(block_bytes, reverse=True)
    num_blocks = 0
    while num_blocks < len(largest) and largest[num_blocks] <= room:
        room -= largest[num_blocks]
        num_blocks += 1
    return num_blocks
