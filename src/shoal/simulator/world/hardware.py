"""What machines can hold and compute: drawn at random, or by the profile of a kind of machine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.peers import MAX_SPEED_POINTS, Capacity
from shoal.policy.machines.machine import Machine
from shoal.spans import Span

LOAD_SECONDS = 60.0
"""Seconds in which a machine loads as many blocks as it can hold, where a study does not say otherwise."""
MEDIAN_BLOCK_SPEED = 6000.0
"""Tokens per second of one block, of a machine of the typical size: about a T4 with LLaMA-2-70B (arXiv 2406.01566)."""
SPREAD_OF_SIZES = 0.46
"""The standard deviation of the logarithm of how many blocks machines can hold, as in Helix's clusters
(`python -m shoal.simulator fit`)."""
SPEED_BY_SIZE = 0.97
"""Machines with more memory are faster: the speed of one block grows with this power of the blocks that a machine can
hold. Fitted, as is what follows."""
SPREAD_OF_SPEED = 0.29
"""The standard deviation of the logarithm of a machine's speed around that of its size."""
SLOWEST_NETWORK, FASTEST_NETWORK = 760.0, 7600.0
"""Tokens per second of 100 Mbit/s and of 1 Gbit/s, with hidden states of 16 KiB."""
FULL_BATCH = 16
"""Sequences that a machine decodes together when it is saturated."""
ROW_SHARE = 0.5
"""The part of the time of a saturated pass that grows with its rows. The rest is the reading of the weights."""
CacheFactors = tuple[float, float]
"""A machine that is full of blocks computes a block at a part of the speed that it has with one block only, because
less memory is left for caches. The part is drawn between these two."""
SLOW_WHEN_FULL: CacheFactors = (0.45, 0.8)
"""As in Helix's clusters."""
EVEN: CacheFactors = (1.0, 1.0)
"""Machines that have room for caches beside all blocks that they can hold."""


@dataclass(frozen=True)
class Hardware:
    """A machine without a place: `max_blocks`, and its speed with a span of each length (`shoal.peers.Capacity`).

    `load_seconds` is what one block takes to load. `kind` names the profile, if there is one.
    """

    max_blocks: int
    block_speeds: tuple[tuple[int, float], ...]
    network_speed: float
    load_seconds: float
    kind: str = ""

    @property
    def capacity(self) -> Capacity:
        """What a server on such a machine announces."""
        return Capacity(
            max_blocks=self.max_blocks,
            block_speeds=tuple(_fewer(self.block_speeds)),
            network_speed=None if math.isinf(self.network_speed) else self.network_speed,
            load_seconds=self.load_seconds,
            disk_seconds=self.load_seconds,
        )

    def machine(
        self, peer: str, span: Span | None, *, zone: str = "", up_since: float = 0.0, ready_at: float = 0.0
    ) -> Machine:
        """The machine as placement sees it, with exact figures. It moves unless it loads."""
        return Machine(
            peer,
            span,
            self.max_blocks,
            self.block_speeds,
            network_speed=self.network_speed,
            movable=not ready_at,
            load_seconds=self.load_seconds,
            disk_seconds=self.load_seconds,
            zone=zone,
            up_since=up_since,
            ready_at=ready_at,
        )

    def block_seconds(self, num_blocks: int) -> tuple[float, float]:
        """Seconds of one block in a pass: of the block itself, and of each of its rows, with a span of this length."""
        saturated = FULL_BATCH / self.machine("", None).block_speed(num_blocks)
        return (1 - ROW_SHARE) * saturated, ROW_SHARE * saturated / FULL_BATCH


def draw_hardware(
    rng: random.Random,
    *,
    typical_blocks: float,
    most_blocks: int,
    load_seconds: float = LOAD_SECONDS,
    cache_factors: CacheFactors = SLOW_WHEN_FULL,
) -> Hardware:
    """A random machine of a swarm whose machines typically hold `typical_blocks` blocks, and at most `most_blocks`."""
    size = typical_blocks * rng.lognormvariate(0.0, SPREAD_OF_SIZES)
    blocks = min(most_blocks, max(1, math.floor(size + rng.random())))
    return _of_size(rng, blocks, typical_blocks, load_seconds, cache_factors)


def typical_hardware(
    max_blocks: int, *, load_seconds: float = LOAD_SECONDS, cache_factors: CacheFactors = SLOW_WHEN_FULL
) -> Hardware:
    """A machine of a cloud's data center that is like all others there: of middling speed, with the fastest network."""
    slow = MEDIAN_BLOCK_SPEED * sum(cache_factors) / 2
    return _between(MEDIAN_BLOCK_SPEED, slow, max_blocks, FASTEST_NETWORK, load_seconds)


def typical_of(mean_blocks: float) -> float:
    """The typical size of machines that hold `mean_blocks` on average: the median."""
    return mean_blocks * math.exp(-(SPREAD_OF_SIZES**2) / 2)


def draw_swarm(
    rng: random.Random,
    *,
    num_machines: int,
    num_blocks: int,
    copies: float,
    load_seconds: float = LOAD_SECONDS,
    cache_factors: CacheFactors = SLOW_WHEN_FULL,
) -> list[Hardware]:
    """Random machines that can together hold each block `copies` times. The largest holds about 4 times the mean."""
    weights = [rng.lognormvariate(0.0, SPREAD_OF_SIZES) for _ in range(num_machines)]
    sizes = share_out(weights, round(copies * num_blocks), least=1, most=num_blocks)
    typical = typical_of(copies * num_blocks / num_machines)
    return [_of_size(rng, size, typical, load_seconds, cache_factors) for size in sizes]


def _of_size(
    rng: random.Random, max_blocks: int, typical_blocks: float, load_seconds: float, cache_factors: CacheFactors
) -> Hardware:
    relative = (max_blocks / typical_blocks) ** SPEED_BY_SIZE
    fast = MEDIAN_BLOCK_SPEED * relative * rng.lognormvariate(0.0, SPREAD_OF_SPEED)
    slow = fast * rng.uniform(*cache_factors)
    network = math.exp(rng.uniform(math.log(SLOWEST_NETWORK), math.log(FASTEST_NETWORK)))
    return _between(fast, slow, max_blocks, network, load_seconds)


def _between(fast: float, slow: float, max_blocks: int, network: float, load_seconds: float) -> Hardware:
    """A machine that computes a block at the speed `fast` if it has one block only, and at `slow` if it is full."""
    speeds = ((1, fast), (max_blocks, slow)) if max_blocks > 1 else ((1, fast),)
    return Hardware(max_blocks, speeds, network, load_seconds / max_blocks)


def share_out(weights: Sequence[float], total: int, *, least: int, most: int) -> list[int]:
    """Whole numbers in proportion to the weights, within limits, whose sum is `total` as nearly as the limits allow."""
    low, high = 0.0, total / min(weights)
    for _ in range(60):
        scale = (low + high) / 2
        if sum(min(most, max(least, math.floor(scale * weight))) for weight in weights) > total:
            high = scale
        else:
            low = scale
    return [min(most, max(least, math.floor(low * weight))) for weight in weights]


def profiled(kind: str, tokens_per_second: Sequence[float], *, network_speed: float, load_seconds: float) -> Hardware:
    """A machine by its measured speeds through spans of 1, 2, … blocks."""
    exact = [(length, speed * length) for length, speed in enumerate(tokens_per_second, start=1)]
    return Hardware(len(exact), tuple(exact), network_speed, load_seconds / len(exact), kind)


def _fewer(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most as many points as a record has room for: always the one that is missed most by the others."""
    kept = {0, len(points) - 1}
    while len(kept) < min(MAX_SPEED_POINTS, len(points)):
        errors = {index: _error(points, kept, index) for index in range(len(points)) if index not in kept}
        kept.add(max(errors, key=errors.__getitem__))
    return [points[index] for index in sorted(kept)]


def _error(points: Sequence[tuple[int, float]], kept: set[int], index: int) -> float:
    """By which part the interpolation between kept points misses a point."""
    left = max(each for each in kept if each < index)
    right = min(each for each in kept if each > index)
    share = (index - left) / (right - left)
    between = points[left][1] + share * (points[right][1] - points[left][1])
    return abs(between - points[index][1]) / points[index][1]
