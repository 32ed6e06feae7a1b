"""When machines come and go: generators with a seed. Their parameters are fitted to traces by `fitting`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

WEIBULL_SHAPE = 0.393
"""The shape of volunteers' lives: many leave soon, and who has stayed long stays longer. With a mean of an hour, half
leave within seven minutes."""


@dataclass(frozen=True, order=True)
class Stay:
    """One machine's time in the swarm, in seconds. One that is there from the start may have begun before 0.

    `slot` says which machine it is: stays of one slot do not overlap and have the same hardware.
    """

    begins: float
    ends: float
    slot: int
    zone: str = ""


@dataclass(frozen=True)
class ZoneHabits:
    """How a cloud zone gives and takes machines: times with machines and without alternate.

    Both are Weibull with these means in seconds and shapes. While the zone has machines, it has a part of `most`, drawn
    anew `changes_per_hour` times an hour from a uniform distribution between `least_share` and 1.
    """

    on_seconds: float
    on_shape: float
    off_seconds: float
    off_shape: float
    most: int
    changes_per_hour: float
    least_share: float


SPOT_16 = ZoneHabits(
    on_seconds=6143, on_shape=0.61, off_seconds=7334, off_shape=0.67, most=16, changes_per_hour=1.09, least_share=0.87
)
"""Up to 16 spot machines a zone: fitted to 11 to 16 days of three zones (`python -m shoal.simulator fit`)."""


def weibull(rng: random.Random, mean: float, shape: float) -> float:
    """A length of life."""
    return rng.weibullvariate(mean / math.gamma(1 + 1 / shape), shape)


def volunteers(
    rng: random.Random, *, num_machines: int, mean_life: float, seconds: float, shape: float = WEIBULL_SHAPE
) -> list[Stay]:
    """Machines that come at random and stay for a Weibull life; on average, `num_machines` are there at any time.

    The swarm is old at time 0: the machines that are there then have the ages that they would have after endless time.
    """
    scale = mean_life / math.gamma(1 + 1 / shape)
    stays: list[Stay] = []
    for _ in range(_poisson(rng, num_machines)):
        # The life during which a moment falls is longer than a usual life: its distribution is weighted by length.
        life = scale * rng.gammavariate(1 + 1 / shape, 1.0) ** (1 / shape)
        begins = -life * rng.random()
        stays.append(Stay(begins, begins + life, len(stays)))
    now = rng.expovariate(num_machines / mean_life)
    while now < seconds:
        stays.append(Stay(now, now + weibull(rng, mean_life, shape), len(stays)))
        now += rng.expovariate(num_machines / mean_life)
    return stays


def zones_that_vanish(
    rng: random.Random, *, zones: Sequence[str], seconds: float, habits: ZoneHabits = SPOT_16
) -> list[Stay]:
    """Machines of cloud zones that give up to `most` machines for a time, and then none."""
    stays: list[Stay] = []
    for index, zone in enumerate(zones):
        counts = _counts(rng, seconds, habits)
        stays += stays_of_counts(rng, counts, zone=zone, seconds=seconds, first_slot=index * habits.most)
    return sorted(stays)


def _counts(rng: random.Random, seconds: float, habits: ZoneHabits) -> list[tuple[float, int]]:
    """The number of machines of a zone from each time on."""
    counts: list[tuple[float, int]] = []
    is_on = rng.random() < habits.on_seconds / (habits.on_seconds + habits.off_seconds)
    now = 0.0
    while now < seconds:
        mean, shape = (habits.on_seconds, habits.on_shape) if is_on else (habits.off_seconds, habits.off_shape)
        until = now + weibull(rng, mean, shape)
        if is_on:
            while now < min(until, seconds):
                counts.append((now, max(1, round(habits.most * rng.uniform(habits.least_share, 1.0)))))
                now += rng.expovariate(habits.changes_per_hour / 3600)
        counts.append((until, 0))
        now, is_on = until, not is_on
    # A change that was drawn after the zone went is never seen.
    return sorted(counts)


def stays_of_counts(
    rng: random.Random, counts: Sequence[tuple[float, int]], *, zone: str, seconds: float, first_slot: int
) -> list[Stay]:
    """Stays that give these counts: if there are fewer, random machines of the zone end; if there are more, some begin.

    `counts` are times and how many machines there are from then on.
    """
    stays: list[Stay] = []
    present: dict[int, float] = {}
    for at, count in counts:
        if at >= seconds:
            break
        while len(present) > count:
            slot = rng.choice(sorted(present))
            begins = present.pop(slot)
            if begins < at:
                stays.append(Stay(begins, at, slot, zone))
        for slot in range(first_slot, first_slot + count):
            if len(present) >= count:
                break
            present.setdefault(slot, at)
    stays += [Stay(begins, math.inf, slot, zone) for slot, begins in present.items()]
    return sorted(stays)


def _poisson(rng: random.Random, mean: float) -> int:
    """How many events of a Poisson process happen in a time in which `mean` are expected."""
    count, passed = 0, rng.expovariate(1.0)
    while passed < mean:
        count += 1
        passed += rng.expovariate(1.0)
    return count


def present(stays: Sequence[Stay], at: float) -> int:
    """How many machines are there at a time."""
    return sum(stay.begins <= at < stay.ends for stay in stays)


def mean_present(stays: Sequence[Stay], seconds: float) -> float:
    """How many machines are there on average from 0 to `seconds`."""
    return sum(max(0.0, min(stay.ends, seconds) - max(stay.begins, 0.0)) for stay in stays) / seconds
