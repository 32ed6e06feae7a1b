"""What a server could hold and compute with any span of its model, put together from what it measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from shoal.model.body import Body
from shoal.model.weights import disk_cache
from shoal.model.weights.files import LocalFiles
from shoal.peers import Capacity
from shoal.policy.machines.speed_profile import CacheRoom, SpeedProfile, block_speeds
from shoal.server.capacity import block_bytes, bytes_of_token, cache_dtype_of, memory_for_blocks, most_blocks
from shoal.server.config import ServerConfig
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.measured_speed import known_profile
from shoal.server.measuring.load_times import known_times
from shoal.server.measuring.means import Means
from shoal.server.measuring.on_disk import quantizes, quick_blocks, spans_of

UNKNOWN_SECONDS = 1.0
"""The time that a block is assumed to take before the first load, as others assume of a server that says none."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that a token takes in the cache of one block, and beside that of all blocks together."""

    in_block: float
    beside: float


def own_capacity(config: ServerConfig, means: Means, body: Body, profile: SpeedProfile) -> Capacity:
    """The capacity of a server that has loaded these blocks. It is called on the compute thread.

    The bytes of a token are remembered, for `remembered_capacity` at the next start.
    """
    in_blocks, beside = bytes_of_token(body, cache_shapes(body), cache_dtype_of(config, body))
    token = TokenBytes(in_blocks / len(body.span), float(beside))
    disk_cache.store(_token_key(config, means), [token.in_block, token.beside])
    return _capacity(config, means, profile, token)


def remembered_capacity(config: ServerConfig, means: Means) -> Capacity | None:
    """The capacity of a server that has loaded nothing yet, if it has measured blocks of these weights before."""
    profile = known_profile(means.key)
    match disk_cache.load(_token_key(config, means)):
        case [float(in_block), float(beside)] if profile is not None and in_block > 0 and beside >= 0:
            return _capacity(config, means, profile, TokenBytes(in_block, beside))
    return None


@dataclass(frozen=True)
class _Blocks:
    """The most blocks that a server may hold, the mean bytes of one in memory and on disk, and the memory for them.

    What is not known is 0.
    """

    most: int
    in_memory: float
    on_disk: float
    memory: int


def _capacity(config: ServerConfig, means: Means, profile: SpeedProfile, token: TokenBytes) -> Capacity:
    blocks, times = _blocks_of(config, means), known_times(means.key)
    room = CacheRoom(blocks.memory, blocks.in_memory, token.in_block, token.beside, config.cache_tokens)
    is_local = isinstance(means.checkpoint.files, LocalFiles)
    quick = times.quick()
    slow = times.slow(quantizes=quantizes(means), download_bytes=None if is_local else blocks.on_disk)
    return Capacity(
        max_blocks=blocks.most,
        block_speeds=block_speeds(profile, room, blocks.most),
        network_speed=None,
        load_seconds=UNKNOWN_SECONDS if slow is None else slow,
        disk_seconds=UNKNOWN_SECONDS if quick is None else quick,
        on_disk=spans_of(quick_blocks(means)),
    )


def _blocks_of(config: ServerConfig, means: Means) -> _Blocks:
    """A server whose blocks are configured does not ask the hub for the sizes of others."""
    checkpoint = means.checkpoint
    if config.blocks is not None and len(checkpoint.blocks_on_disk()) < checkpoint.num_blocks:
        return _Blocks(len(config.blocks), 0.0, 0.0, means.free_bytes)
    memory = memory_for_blocks(config, checkpoint, means.dtype, means.free_bytes)
    sizes = block_bytes(checkpoint, means.dtype, means.device, means.quantization)
    most = most_blocks(config, sizes, memory) if config.blocks is None else len(config.blocks)
    return _Blocks(max(1, most), statistics.fmean(sizes), statistics.fmean(checkpoint.block_bytes), memory)


def _token_key(config: ServerConfig, means: Means) -> str:
    return f"bytes of a token in a block of {means.key}, cache in {config.cache_dtype}"
