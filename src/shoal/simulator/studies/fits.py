"""How well generators fit data: churn and traces, with the distributions side by side; hardware and clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.simulator.studies.report import Report, Table, share
from shoal.simulator.studies.settings import HOUR
from shoal.simulator.world.clusters import Cluster
from shoal.simulator.world.fitting import (
    Durations,
    HardwareFit,
    WeibullFit,
    fit_habits,
    fit_hardware,
    fit_weibull,
    lives,
    on_and_off,
)
from shoal.simulator.world.traces import TraceFile


@dataclass(frozen=True)
class FitOf:
    """One kind of duration of one trace, and its fit."""

    name: str
    durations: Durations
    fit: WeibullFit


def fits(name: str, trace: TraceFile) -> list[FitOf]:
    """The fits of a trace; kinds of durations that it has too few of are left out."""
    on, off = on_and_off(trace)
    kinds = {"zone has machines": on, "zone has none": off, "life of a machine": lives(trace)}
    return [
        FitOf(f"{name}: {kind}", durations, fit_weibull(durations))
        for kind, durations in kinds.items()
        if len(set(durations.ended)) > 1
    ]


def report(traces: Sequence[tuple[str, TraceFile]], found: Sequence[FitOf], clusters: Sequence[Cluster] = ()) -> Report:
    """Two tables: of durations, and of the habits of zones. With clusters, a third: of their machines."""
    durations = tuple(
        (
            each.name,
            str(each.fit.num_durations),
            f"{each.fit.shape:.3f}",
            f"{each.fit.mean / HOUR:.2f} h",
            f"{sorted(each.durations.ended)[len(each.durations.ended) // 2] / HOUR:.2f} h",
            f"{each.fit.distance:.2f}",
        )
        for each in found
    )
    zones = []
    for name, trace in traces:
        habits, _, _ = fit_habits(trace)
        zones.append(
            (
                name,
                f"{habits.on_seconds:.0f} s, shape {habits.on_shape:.2f}",
                f"{habits.off_seconds:.0f} s, shape {habits.off_shape:.2f}",
                str(habits.most),
                f"{habits.changes_per_hour:.2f}",
                f"{habits.least_share:.2f}",
            )
        )
    tables = [
        Table(("durations", "number", "shape", "mean of the fit", "median of the data", "distance"), durations),
        Table(("zones of", "with machines", "without", "most", "changes an hour", "least share"), tuple(zones)),
    ]
    if clusters:
        tables.append(_of_hardware(fit_hardware(clusters)))
    notes = (
        "Weibull distributions, most likely ones; what was cut off by the end of a trace counts as lasting longer. The"
        " distance is the largest between the distributions of data and fit (Kolmogorov-Smirnov)."
    )
    return Report("fit", "Generators fitted to traces and clusters", tuple(tables), notes)


def _of_hardware(fit: HardwareFit) -> Table:
    least, most = fit.cache_factors
    headings = ("machines", "spread of sizes", "speed by size", "spread of speed", "correlation", "full machine")
    figures = (fit.spread_of_sizes, fit.speed_by_size, fit.spread_of_speed, fit.correlation)
    return Table(headings, ((str(fit.num_machines), *map(share, figures), f"{share(least)} to {share(most)}"),))


def draw(found: Sequence[FitOf], figure: Any) -> None:
    """The part that lasts longer, by time: steps for the data, a line for the fit."""
    panel = figure.subplots()
    for each in found:
        ended = sorted(each.durations.ended)
        parts = [1 - index / len(ended) for index in range(len(ended))]
        (line,) = panel.step([seconds / HOUR for seconds in ended], parts, where="pre", linewidth=0.8, label=each.name)
        fitted = [each.fit.survival(seconds) for seconds in ended]
        panel.plot([seconds / HOUR for seconds in ended], fitted, "--", color=line.get_color(), linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xlabel("hours; dashed: the fit")
    panel.set_ylabel("part that lasts longer")
    panel.legend(fontsize="xx-small")
