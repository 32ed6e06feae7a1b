"""Rules for joining and moving side by side, in swarms whose machines come and go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from textwrap import wrap
from typing import Any

from shoal.simulator.fluid.arrangement import Arrangement, Delays
from shoal.simulator.fluid.measures import Summary, mean_of
from shoal.simulator.fluid.rules import Rule
from shoal.simulator.studies.report import Report, Table, percent, seconds, share
from shoal.simulator.studies.rule_names import rule_of
from shoal.simulator.studies.settings import Setting
from shoal.simulator.studies.study_progress import Advance

HEADINGS = (
    "churn",
    "rule",
    "exact",
    "holes",
    "of these left over",
    "min",
    "moves per departure",
    "median heal",
    "no placement possible",
)
CHUNK = 600.0
"""Virtual seconds between two signs of progress."""
LABEL_WIDTH = 12
"""Characters of a line under the bars of a plot."""


@dataclass(frozen=True)
class RunGrid:
    """What is run: every setting with every rule and seed, for `hours` each."""

    settings: Sequence[Setting]
    rules: Sequence[str]
    seeds: Sequence[int]
    hours: float
    delays: Delays
    load_seconds: float

    @property
    def num_runs(self) -> int:
        """The number of runs."""
        return len(self.settings) * len(self.rules) * len(self.seeds)


def run_all(grid: RunGrid, advance: Advance, *, jobs: int) -> dict[tuple[str, str], Summary]:
    """The averages over seeds, by setting and rule."""
    found: dict[tuple[str, str], list[tuple[int, Summary]]] = {}
    keys = [(setting, rule, seed) for setting in grid.settings for rule in grid.rules for seed in grid.seeds]
    if jobs == 1:
        for setting, rule, seed in keys:
            summary = run(grid, setting, rule_of(rule), seed, advance)
            found.setdefault((setting.name, rule), []).append((seed, summary))
    else:
        numbers = {setting.name: index for index, setting in enumerate(grid.settings)}
        # Settings hold functions, which only a forked process inherits.
        with ProcessPoolExecutor(jobs, get_context("fork"), initializer=_keep, initargs=(grid,)) as pool:
            tasks = {pool.submit(_run_kept, numbers[key[0].name], *key[1:]): key for key in keys}
            for task in as_completed(tasks):
                setting, rule, seed = tasks[task]
                found.setdefault((setting.name, rule), []).append((seed, task.result()))
                advance(1 / grid.num_runs, f"{setting.name}, {rule}, seed {seed}")
    return {key: mean_of([summary for _, summary in sorted(several, key=_seed)]) for key, several in found.items()}


def _seed(numbered: tuple[int, Summary]) -> int:
    return numbered[0]


def run(grid: RunGrid, setting: Setting, rule: Rule, seed: int, advance: Advance) -> Summary:
    """One run."""
    scene = setting.scene(seed=seed, hours=grid.hours, delays=grid.delays, load_seconds=grid.load_seconds)
    arrangement = Arrangement(scene, rule, seed=seed)
    at = 0.0
    while at < scene.seconds:
        step = min(CHUNK, scene.seconds - at)
        at += step
        arrangement.advance(at)
        advance(step / scene.seconds / grid.num_runs, f"{setting.name}, {rule.name}, seed {seed}")
    return arrangement.summary()


_kept: list[RunGrid] = []
"""The grid of a worker process."""


def _keep(grid: RunGrid) -> None:
    _kept[:] = [grid]


def _run_kept(setting: int, rule: str, seed: int) -> Summary:
    (grid,) = _kept
    return run(grid, grid.settings[setting], rule_of(rule), seed, lambda share, now: None)


def report(grid: RunGrid, summaries: dict[tuple[str, str], Summary], name: str = "side-by-side") -> Report:
    """The table: a row for each setting and rule. `name` is that of its files."""
    rows: list[tuple[str, ...]] = []
    for setting in grid.settings:
        for index, rule in enumerate(grid.rules):
            summary = summaries[setting.name, rule]
            rows.append((setting.name if not index else "", rule, *_figures(summary)))
        if setting.goal is not None:
            goal = setting.goal
            minimum = "" if goal.minimum is None else f"≥ {share(goal.minimum)}"
            holes = f"≤ {percent(goal.hole)}"
            heal = f"≤ {seconds(grid.load_seconds + 10)}"
            rows.append(("", "*goal*", f"≥ {share(goal.exact)}", holes, "", minimum, f"≤ {goal.moves:g}", heal, ""))
    runs = "One run" if len(grid.seeds) == 1 else f"Averages of {len(grid.seeds)} runs"
    notes = (
        f"{runs} of {grid.hours:g} h after half an hour. A span as long as a machine can"
        f" hold loads in {grid.load_seconds:g} s; views are up to {grid.delays.view:g} s old; a vanished server stays"
        f" in them for {grid.delays.vanish:g} s."
    )
    return Report(name, "Rules for joining and moving side by side", (Table(HEADINGS, tuple(rows)),), notes)


def _figures(summary: Summary) -> tuple[str, ...]:
    return (
        share(summary.exact),
        percent(summary.hole),
        percent(summary.left_over),
        share(summary.minimum),
        f"{summary.moves_per_departure:.2f}",
        seconds(summary.heal_seconds),
        percent(summary.impossible),
    )


def draw(grid: RunGrid, summaries: dict[tuple[str, str], Summary], figure: Any) -> None:
    """Bars of the exact share, and of the time with a hole, by setting and rule."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(grid.rules)
    for index, rule in enumerate(grid.rules):
        at = [place + width * (index + 0.5) - 0.4 for place in range(len(grid.settings))]
        found = [summaries[setting.name, rule] for setting in grid.settings]
        upper.bar(at, [each.exact for each in found], width, label=rule)
        lower.bar(at, [100 * each.hole for each in found], width)
    upper.set_ylabel("share of the bound")
    upper.set_ylim(0, 1)
    lower.set_ylabel("% of the time with a hole")
    lower.set_ylim(0, max(1.0, lower.get_ylim()[1]))
    lower.set_xticks(range(len(grid.settings)), ["\n".join(_lines(setting.name)) for setting in grid.settings])
    lower.tick_params(axis="x", labelsize="x-small")
    figure.legend(loc="outside upper center", ncols=4, fontsize="x-small")


def _lines(name: str) -> list[str]:
    """The name of a setting in lines that have room beside those of others. A number stays with its unit."""
    name = re.sub(r"(?<=\d) ", "\N{NO-BREAK SPACE}", name)
    return [line for part in name.split(", ") for line in wrap(part, LABEL_WIDTH)]
