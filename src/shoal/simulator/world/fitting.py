"""Fits of the generators in `stays` to traces: the most likely Weibull lives, and how far data and fit are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.simulator.world.clusters import Cluster
from shoal.simulator.world.stays import ZoneHabits
from shoal.simulator.world.traces import TraceFile


@dataclass(frozen=True)
class Durations:
    """How long something lasted, in seconds. What began before a trace or ended after it lasted at least `cut`."""

    ended: tuple[float, ...]
    cut: tuple[float, ...] = ()


@dataclass(frozen=True)
class WeibullFit:
    """A Weibull distribution. `distance` is the largest gap between its distribution and that of the data."""

    shape: float
    scale: float
    distance: float
    num_durations: int

    @property
    def mean(self) -> float:
        """The mean of the distribution."""
        return self.scale * math.gamma(1 + 1 / self.shape)

    def survival(self, seconds: float) -> float:
        """The part that lasts longer."""
        return math.exp(-((seconds / self.scale) ** self.shape))


def fit_weibull(durations: Durations) -> WeibullFit:
    """The most likely Weibull distribution; some durations may be cut off. Raises `ValueError` for fewer than two."""
    ended, every = durations.ended, (*durations.ended, *durations.cut)
    if len(ended) < 2 or min(every) <= 0 or len(set(every)) < 2:
        raise ValueError("a fit takes two different durations, which are positive")
    longest = max(every)
    logs = [math.log(each / longest) for each in every]  # of parts of the longest, so that no power overflows
    mean_log = sum(math.log(each / longest) for each in ended) / len(ended)

    def slope(shape: float) -> float:
        powers = [math.exp(shape * each) for each in logs]
        weighted = sum(power * each for power, each in zip(powers, logs, strict=True)) / sum(powers)
        return weighted - 1 / shape - mean_log

    low, high = 0.01, 100.0
    for _ in range(100):
        shape = math.sqrt(low * high)
        low, high = (shape, high) if slope(shape) < 0 else (low, shape)
    scale = longest * (sum(math.exp(shape * each) for each in logs) / len(ended)) ** (1 / shape)
    return WeibullFit(shape, scale, _distance(sorted(ended), shape, scale), len(ended))


def _distance(ended: Sequence[float], shape: float, scale: float) -> float:
    """The Kolmogorov-Smirnov distance."""
    largest = 0.0
    for index, seconds in enumerate(ended):
        below = 1 - math.exp(-((seconds / scale) ** shape))
        largest = max(largest, abs(below - index / len(ended)), abs(below - (index + 1) / len(ended)))
    return largest


def on_and_off(trace: TraceFile) -> tuple[Durations, Durations]:
    """How long zones had machines, and how long they had none."""
    found: dict[bool, tuple[list[float], list[float]]] = {True: ([], []), False: ([], [])}
    for zone in trace.zones.values():
        turns = [(at, count > 0) for at, count in zone.counts]
        turns = [turns[0], *(after for before, after in pairwise(turns) if before[1] != after[1])]
        for index, (at, is_on) in enumerate(turns):
            is_last = index + 1 == len(turns)
            until = zone.seconds if is_last else turns[index + 1][0]
            if until > at:
                found[is_on][is_last or not index].append(until - at)
    on, off = (Durations(tuple(found[kind][0]), tuple(found[kind][1])) for kind in (True, False))
    return on, off


def lives(trace: TraceFile) -> Durations:
    """How long machines were there, if those that came first go first: counts do not say which machine went."""
    ended: list[float] = []
    cut: list[float] = []
    for zone in trace.zones.values():
        since: list[float] = []
        for at, count in zone.counts:
            while len(since) > count:
                ended.append(at - since.pop(0))
            since += [at] * (count - len(since))
        cut += [zone.seconds - at for at in since if zone.seconds > at]
    return Durations(tuple(each for each in ended if each > 0), tuple(cut))


def fit_habits(trace: TraceFile) -> tuple[ZoneHabits, WeibullFit, WeibullFit]:
    """The habits of zones as in a trace, and the fits of the times with machines and without."""
    on, off = (fit_weibull(durations) for durations in on_and_off(trace))
    seconds, machines, changes = 0.0, 0.0, 0
    for zone in trace.zones.values():
        for (at, count), (until, _) in pairwise([*zone.counts, (zone.seconds, 0)]):
            if count:
                seconds += until - at
                machines += count * (until - at)
                changes += 1
    mean_share = machines / seconds / trace.most_per_zone
    habits = ZoneHabits(
        on_seconds=on.mean,
        on_shape=on.shape,
        off_seconds=off.mean,
        off_shape=off.shape,
        most=trace.most_per_zone,
        changes_per_hour=changes / seconds * 3600,
        # A uniform distribution between this and 1 has the mean of the trace.
        least_share=min(1.0, max(1 / trace.most_per_zone, 2 * mean_share - 1)),
    )
    return habits, on, off


@dataclass(frozen=True)
class HardwareFit:
    """How machines of real clusters differ; what `hardware` calls by the same names.

    `spread_of_sizes` is the standard deviation of the logarithm of the blocks that a machine can hold. The speed of one
    block grows with the power `speed_by_size` of that number; `spread_of_speed` is what is left in its logarithm.
    `cache_factors` are the least and the largest speed of a block in a full machine, as parts of its speed alone.
    """

    num_machines: int
    spread_of_sizes: float
    speed_by_size: float
    spread_of_speed: float
    correlation: float
    cache_factors: tuple[float, float]


def fit_hardware(clusters: Sequence[Cluster]) -> HardwareFit:
    """The machines of all clusters, compared with those that serve the same model, by least squares.

    Raises `ValueError` if they all hold the same number of blocks.
    """
    sizes: list[float] = []  # logarithms, less the mean of the model
    speeds: list[float] = []
    factors: list[float] = []
    for num_blocks in sorted({cluster.num_blocks for cluster in clusters}):
        same = [each for cluster in clusters if cluster.num_blocks == num_blocks for each in cluster.machines]
        sizes += _centered([math.log(each.max_blocks) for each in same])
        speeds += _centered([math.log(each.block_speeds[0][1]) for each in same])
        factors += [each.block_speeds[-1][1] / each.block_speeds[0][1] for each in same]
    variance, of_speeds = (sum(each * each for each in values) / len(values) for values in (sizes, speeds))
    if not variance:
        raise ValueError("all machines hold the same number of blocks")
    together = sum(size * speed for size, speed in zip(sizes, speeds, strict=True)) / len(sizes)
    return HardwareFit(
        num_machines=len(sizes),
        spread_of_sizes=math.sqrt(variance),
        speed_by_size=together / variance,
        spread_of_speed=math.sqrt(max(0.0, of_speeds - together**2 / variance)),
        correlation=together / math.sqrt(variance * of_speeds) if of_speeds else 0.0,
        cache_factors=(min(factors), max(factors)),
    )


def _centered(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [each - mean for each in values]
