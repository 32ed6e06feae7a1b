"""Traces of availability, read from JSON files that users name. Their format is in docs/scale.md."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoal.errors import UserError
from shoal.simulator.world.json_files import read_json
from shoal.simulator.world.stays import Stay, mean_present, stays_of_counts

Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]


class ZoneTrace(BaseModel):
    """The machines of one zone: `changes` is a flat list of a second, the count from then on, and so on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str = ""
    seconds: Seconds
    changes: tuple[Seconds, ...]

    @model_validator(mode="after")
    def _is_in_pairs(self) -> ZoneTrace:
        if not self.changes or len(self.changes) % 2:
            raise ValueError("`changes` has pairs of a second and a count")
        if any(one >= other for one, other in pairwise(self.changes[::2])):
            raise ValueError("the seconds of `changes` grow")
        if any(count != int(count) for count in self.changes[1::2]):
            raise ValueError("counts are whole numbers")
        return self

    @property
    def counts(self) -> list[tuple[float, int]]:
        """Times, and how many machines there are from then on."""
        return [(at, int(count)) for at, count in zip(self.changes[::2], self.changes[1::2], strict=True)]


class TraceFile(BaseModel):
    """The traces of a file, by zone. No zone has more than `most_per_zone` machines."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: str = ""
    most_per_zone: Annotated[int, Field(ge=1, le=100_000)]
    zones: Annotated[dict[str, ZoneTrace], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _counts_are_limited(self) -> TraceFile:
        if any(count > self.most_per_zone for zone in self.zones.values() for _, count in zone.counts):
            raise ValueError("a count is above `most_per_zone`")
        return self

    @property
    def seconds(self) -> float:
        """How long all zones are known."""
        return min(zone.seconds for zone in self.zones.values())


@dataclass(frozen=True)
class Window:
    """A part of a trace, which begins at this second of the trace."""

    begins: float
    seconds: float


def read_trace(path: Path) -> TraceFile:
    """The traces in a file. Raises `UserError` if it cannot be read, or has another format."""
    return read_json(path, TraceFile)


def stays_of_trace(rng: random.Random, trace: TraceFile, window: Window) -> list[Stay]:
    """The machines of a window of a trace. Time 0 is where the window begins."""
    stays: list[Stay] = []
    for index, (name, zone) in enumerate(sorted(trace.zones.items())):
        counts = _shifted(zone.counts, window.begins)
        first_slot = index * trace.most_per_zone
        stays += stays_of_counts(rng, counts, zone=name, seconds=window.seconds, first_slot=first_slot)
    return sorted(stays)


def busiest_windows(trace: TraceFile, *, seconds: float, least_machines: float, most: int) -> list[Window]:
    """At most `most` windows that do not overlap, in which at least `least_machines` machines are there on average.

    A swarm cannot be studied while no zone has machines. Raises `UserError` if there is no such window.
    """
    chance = random.Random(0)  # noqa: S311 - which machine of a zone ends does not change the mean
    found: list[Window] = []
    for index in range(int(trace.seconds // seconds)):
        window = Window(index * seconds, seconds)
        if mean_present(stays_of_trace(chance, trace, window), seconds) >= least_machines:
            found.append(window)
    if not found:
        hours = f"{seconds / 3600:g} h"
        raise UserError(f"the trace has no window of {hours} with {least_machines:g} machines on average")
    step = max(1, len(found) // most)
    return found[::step][:most]


def _shifted(counts: Sequence[tuple[float, int]], begins: float) -> list[tuple[float, int]]:
    before = [count for at, count in counts if at <= begins]
    later = [(at - begins, count) for at, count in counts if at > begins]
    return [(0.0, before[-1] if before else 0), *later]
