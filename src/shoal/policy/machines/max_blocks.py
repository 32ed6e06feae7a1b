"""How many blocks fit into a server's memory, and the cache that is left for sessions."""

from __future__ import annotations

from collections.abc import Sequence

CACHE_SHARE = 0.2
"""The fraction of a server's memory that is reserved for sessions' caches when it chooses how many blocks to hold."""
MAX_CACHE_TOKENS = 1 << 20
"""The most tokens of a cache whose size the server chooses. A machine with much memory may have other uses for it."""
MAX_FREE_FRACTION = 0.8
"""The most that such a cache takes of the memory that is free after the blocks are loaded. Passes need the rest."""


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


def cache_tokens(*, free_before: float, free_after: float, token_bytes: float) -> int:
    """For how many tokens a server makes a cache, if each takes `token_bytes` in all of its blocks.

    `free_before` and `free_after` are the bytes of memory that are free before and after the blocks are loaded.
    """
    cache_bytes = min(CACHE_SHARE * free_before, MAX_FREE_FRACTION * free_after)
    return max(0, int(min(cache_bytes // token_bytes, MAX_CACHE_TOKENS)))
