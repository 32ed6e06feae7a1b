"""The paper's claim that its load balancing keeps a swarm at 90 to 100 % of the optimum, made precise and measured.

The optimum is meant in two ways: the bound that no placement can pass, averaged over time; and what an offline search
finds for the machines that are there, at some moments of the run.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.policy.machines.throughput import exact_throughput
from shoal.simulator.fluid.arrangement import Arrangement
from shoal.simulator.fluid.measures import Summary
from shoal.simulator.studies.offline_search import search
from shoal.simulator.studies.report import Report, Table, percent, share
from shoal.simulator.studies.rule_names import rule_of
from shoal.simulator.studies.settings import HOUR, WARM_UP
from shoal.simulator.studies.side_by_side import RunGrid
from shoal.simulator.studies.study_progress import Advance

EVERY = HOUR / 3
"""Seconds between two moments at which the offline search looks."""

COLUMNS = 2
"""Panels of the plot beside each other."""


@dataclass(frozen=True)
class Balance:
    """One run: averages over time, the mean share of the offline search, and the shares of the bound over time.

    `of_search` is None if the machines could not hold the model at any of the moments.
    """

    setting: str
    rule: str
    summary: Summary
    of_search: float | None
    times: tuple[float, ...]
    shares: tuple[float, ...]


def run_all(grid: RunGrid, advance: Advance, *, num_tries: int) -> list[Balance]:
    """One run for each setting and rule, with the first seed."""
    found = []
    for setting in grid.settings:
        for rule in grid.rules:
            scene = setting.scene(
                seed=grid.seeds[0], hours=grid.hours, delays=grid.delays, load_seconds=grid.load_seconds
            )
            arrangement = Arrangement(scene, rule_of(rule), seed=grid.seeds[0])
            rng = random.Random(grid.seeds[0])  # noqa: S311 - repeatable, not secret
            shares: list[float] = []
            looks = range(max(1, round(grid.hours * HOUR / EVERY)))
            for look in looks:
                arrangement.advance(WARM_UP + look * EVERY)
                of_search = _share_of_search(arrangement, num_tries, rng)
                shares += [] if of_search is None else [of_search]
                advance(1 / len(looks) / len(grid.settings) / len(grid.rules), f"{setting.name}, {rule}")
            arrangement.advance(scene.seconds)
            times, worth = _line(arrangement)
            found.append(
                Balance(
                    setting.name,
                    rule,
                    arrangement.summary(),
                    statistics.fmean(shares) if shares else None,
                    times,
                    worth,
                )
            )
    return found


def _line(arrangement: Arrangement) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Hours from the first moment that counts to the end of the run, and the exact share from each of them on."""
    begins, history = arrangement.meter.begins, arrangement.meter.history
    before = [each for now, each, _ in history if now <= begins]
    points = [(begins, before[-1])] if before else []
    points += [(now, each) for now, each, _ in history if now > begins]
    if points:
        points.append((arrangement.now, points[-1][1]))
    return tuple((now - begins) / HOUR for now, _ in points), tuple(each for _, each in points)


def _share_of_search(arrangement: Arrangement, num_tries: int, rng: random.Random) -> float | None:
    """What the servers that are online reach now, of what a search finds for all machines that are there.

    None if these machines cannot hold the model.
    """
    blocks = arrangement.scene.num_blocks
    members = arrangement.members.values()
    now = exact_throughput([member.machine() for member in members if member.online], blocks)
    from_here = search([member.machine() for member in members], blocks, num_tries=num_tries, rng=rng)
    anywhere = [replace(member.machine(), span=None) for member in members]
    found = max(from_here.exact, search(anywhere, blocks, num_tries=num_tries, rng=rng).exact)
    return now / found if found else None


def report(balances: Sequence[Balance], grid: RunGrid) -> Report:
    """The shares of the two optima."""
    rows = tuple(
        (
            each.setting,
            each.rule,
            share(each.summary.exact),
            share(each.of_search),
            share(each.summary.minimum),
            percent(each.summary.hole),
        )
        for each in balances
    )
    headings = ("churn", "rule", "exact, of the bound", "exact, of an offline search", "min, of the bound", "holes")
    notes = (
        f"One run of {grid.hours:g} h each, after half an hour. The search runs every {EVERY / 60:.0f} minutes,"
        " over the machines that are there at that moment, also those that are still loading."
    )
    return Report("balance", "How near the optimum load balancing keeps a swarm", (Table(headings, rows),), notes)


def draw(balances: Sequence[Balance], figure: Any) -> None:
    """The exact share over time: a panel for each setting, a line for each rule."""
    settings = list(dict.fromkeys(each.setting for each in balances))
    num_rows = -(-len(settings) // COLUMNS)
    figure.set_size_inches(11, 1.2 + 1.9 * num_rows)
    panels = figure.subplots(num_rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for panel, setting in zip(panels, settings, strict=False):
        for each in balances:
            if each.setting == setting:
                panel.step(each.times, each.shares, where="post", label=each.rule, linewidth=1.0)
        panel.set_title(setting, fontsize="small")
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("hours", fontsize="small")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", ncols=4, loc="outside lower center")
