"""The tables that `failures.py` prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("ours", "standby", "restarting", "no-caches", "guessing")
GOALS = {
    ("ours", 128): {1e-3: 0.98, 1e-2: 0.85, 1e-1: 0.40},
    ("ours", 1024): {1e-3: 0.95, 1e-2: 0.70, 1e-1: 0.25},
    ("standby", 1024): {1e-3: 0.97, 1e-2: 0.90, 1e-1: 0.55},
}


@dataclass(frozen=True)
class Run:
    """One generation. `speed` is in tokens/s, and None if it did not finish. `same_tokens` is None if not compared."""

    mode: str
    num_tokens: int
    rate: float
    speed: float | None
    ratio: float | None
    expected: float | None
    num_failures: int
    same_tokens: bool | None


@dataclass(frozen=True)
class Gap:
    """The longest gap between two tokens after a server was killed, and the median step before that, in seconds.

    `same_tokens` is whether they are those of an undisturbed generation; None if that was not compared.
    """

    mode: str
    seconds: float
    step_seconds: float
    same_tokens: bool | None = None


def median_of(values: Sequence[float | None]) -> float | None:
    """The median; None if there are no values, or if a run did not finish."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def print_runs(runs: Sequence[Run]) -> None:
    print("| mode | tokens | p | tokens/s | ratio to p = 0 | goal | expected tokens/s | failures | same tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    keys = list(dict.fromkeys((run.num_tokens, MODES.index(run.mode), run.rate) for run in runs))
    for num_tokens, mode, rate in sorted(keys):
        same = [run for run in runs if (run.num_tokens, MODES.index(run.mode), run.rate) == (num_tokens, mode, rate)]
        speed, ratio = median_of([run.speed for run in same]), median_of([run.ratio for run in same])
        expected = median_of([run.expected for run in same])
        goal = GOALS.get((MODES[mode], num_tokens), {}).get(rate)
        compared = [run.same_tokens for run in same if run.same_tokens is not None]
        print(
            f"| {MODES[mode]} | {num_tokens} | {rate:g} | {'did not finish' if speed is None else f'{speed:.2f}'} "
            f"| {'' if ratio is None else f'**{ratio:.2f}**'} | {'' if goal is None else f'{goal:.2f}'} "
            f"| {'' if expected is None else f'{expected:.3g}'} | {sum(run.num_failures for run in same)} "
            f"| {f'{sum(compared)} of {len(compared)}' if compared else ''} |"
        )


def print_gaps(gaps: Sequence[Gap], num_tokens: int) -> None:
    print(f"\nA server killed at {num_tokens} tokens; the longest gap between two tokens:\n")
    print("| mode | kills | a step, ms | median gap, ms | in steps | worst gap, ms | in steps | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for mode in dict.fromkeys(gap.mode for gap in gaps):
        of_mode = [gap for gap in gaps if gap.mode == mode]
        step = statistics.median(gap.step_seconds for gap in of_mode)
        compared = [gap.same_tokens for gap in of_mode if gap.same_tokens is not None]
        middle, worst = (act(gap.seconds for gap in of_mode) for act in (statistics.median, max))
        print(
            f"| {mode} | {len(of_mode)} | {1e3 * step:.0f} | {1e3 * middle:.0f} | **{middle / step:.1f}** "
            f"| {1e3 * worst:.0f} | **{worst / step:.1f}** "
            f"| {f'{sum(compared)} of {len(compared)}' if compared else ''} |"
        )
