"""The churn that rules are compared in: where machines come from, and what is expected of a good rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.simulator.fluid.arrangement import Delays, Scene
from shoal.simulator.world.hardware import (
    EVEN,
    LOAD_SECONDS,
    SLOW_WHEN_FULL,
    CacheFactors,
    Hardware,
    draw_hardware,
    typical_hardware,
    typical_of,
)
from shoal.simulator.world.stays import Stay, mean_present, volunteers, zones_that_vanish
from shoal.simulator.world.traces import TraceFile, Window, busiest_windows, stays_of_trace

HOUR = 3600.0
NUM_BLOCKS = 80
NUM_MACHINES = 40
WARM_UP = 1800.0
Stays = Callable[[random.Random, float], list[Stay]]
"""Draws the machines that come and go in a number of seconds."""


@dataclass(frozen=True)
class Goal:
    """What a rule should reach: shares of the bound at least, time with a hole and moves per departure at most."""

    exact: float
    hole: float
    minimum: float | None = None
    moves: float = 1.5

    def __str__(self) -> str:
        parts = [f"≥ {self.exact:g}", f"≤ {100 * self.hole:g} %"]
        return " / ".join([*parts, f"≥ {self.minimum:g}"] if self.minimum is not None else parts)


@dataclass(frozen=True)
class Setting:
    """One kind of churn: the machines can hold each block `copies` times on average.

    If they are `alike`, each has the same hardware, as instances of one type in a cloud have. `cache_factors` say how
    much slower they are when they are full.
    """

    name: str
    copies: float
    stays: Stays
    goal: Goal | None = None
    alike: bool = False
    cache_factors: CacheFactors = EVEN

    def scene(self, *, seed: int, hours: float, delays: Delays, load_seconds: float = LOAD_SECONDS) -> Scene:
        """The same scene for the same seed, whatever the rule."""
        seconds = WARM_UP + hours * HOUR
        rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
        stays = self.stays(rng, seconds)
        mean_size = self.copies * NUM_BLOCKS / mean_present(stays, seconds)
        if self.alike:
            size = min(NUM_BLOCKS, max(1, round(mean_size)))
            one = typical_hardware(size, load_seconds=load_seconds, cache_factors=self.cache_factors)
            machines = {stay.slot: one for stay in stays}
        else:
            machines = hardware_by_slot(
                stays, mean_size=mean_size, load_seconds=load_seconds, seed=seed, cache_factors=self.cache_factors
            )
        return Scene(NUM_BLOCKS, stays, machines.__getitem__, seconds, warm_up=WARM_UP, delays=delays)


def hardware_by_slot(
    stays: Sequence[Stay],
    *,
    mean_size: float,
    load_seconds: float,
    seed: int,
    cache_factors: CacheFactors,
) -> dict[int, Hardware]:
    """A random machine for each slot, which holds `mean_size` blocks on average."""
    found: dict[int, Hardware] = {}
    typical = typical_of(mean_size)
    for slot in sorted({stay.slot for stay in stays}):
        rng = random.Random(f"{seed} {slot}")  # noqa: S311 - repeatable, not secret
        found[slot] = draw_hardware(
            rng,
            typical_blocks=typical,
            most_blocks=NUM_BLOCKS,
            load_seconds=load_seconds,
            cache_factors=cache_factors,
        )
    return found


def volunteering(mean_hours: float, num_machines: int = NUM_MACHINES) -> Stays:
    """Volunteers with Weibull lives of this mean."""

    def draw(rng: random.Random, seconds: float) -> list[Stay]:
        return volunteers(rng, num_machines=num_machines, mean_life=mean_hours * HOUR, seconds=seconds)

    return draw


def spot(num_zones: int = 3) -> Stays:
    """Zones of a cloud, with the fitted habits."""

    def draw(rng: random.Random, seconds: float) -> list[Stay]:
        return zones_that_vanish(rng, zones=[f"zone{index}" for index in range(num_zones)], seconds=seconds)

    return draw


def traced(trace: TraceFile, *, least_machines: float) -> Stays:
    """Windows of a trace in which at least `least_machines` machines are there on average; the seed chooses which."""

    def draw(rng: random.Random, seconds: float) -> list[Stay]:
        window = rng.choice(busiest_windows(trace, seconds=seconds, least_machines=least_machines, most=1000))
        return stays_of_trace(rng, trace, Window(window.begins, seconds))

    return draw


GOALS = (
    Setting("half leave within 7 min, 2.5 copies", 2.5, volunteering(1), Goal(0.68, 0.02, 0.42)),
    Setting("mean life 10 h, 2.5 copies", 2.5, volunteering(10), Goal(0.85, 0.002, 0.62)),
    Setting("spot zones that vanish, 3 copies", 3.0, spot(), Goal(0.85, 0.02, 0.64), alike=True),
    Setting("mean life 10 h, 5 copies", 5.0, volunteering(10), Goal(0.94, 0.0, 0.77, moves=0.5)),
    Setting("mean life 10 h, 8 copies", 8.0, volunteering(10), Goal(0.97, 0.0, moves=0.5)),
)
"""The rows of the table of goals, with generated machines that are as fast when they are full."""
GENERATED = (
    *GOALS,
    *(replace(each, name=f"{each.name}, slow when full", goal=None, cache_factors=SLOW_WHEN_FULL) for each in GOALS),
)
"""These, and the same with machines that are slower when they are full: a shorter span may then be the better one."""


def traced_settings(name: str, trace: TraceFile) -> list[Setting]:
    """A trace at 3 and at 5 copies, in windows with at least a third of the machines that there can be.

    Machines are alike if the trace names one kind of machine for all zones.
    """
    least = trace.most_per_zone * len(trace.zones) / 3
    stays = traced(trace, least_machines=least)
    kinds = {zone.machine for zone in trace.zones.values()}
    alike = len(kinds) == 1 and kinds != {""}
    return [
        Setting(f"{name}, 3 copies", 3.0, stays, Goal(0.85, 0.02, 0.64), alike),
        Setting(f"{name}, 5 copies", 5.0, stays, Goal(0.94, 0.0, 0.77, moves=0.5), alike),
    ]
