"""The results of a comparison as a table of Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.errors import UserError
from shoal.simulator.serving.comparison import Policy, Row

HEADER = (
    "policy", "mean s", "95 % s", "first token, mean s", "95 % s", "preempted a job", "refused a job",
    "computed again", "busy",
)  # fmt: skip


def table(rows: Sequence[Row], load: float) -> str:
    """The rows of one load."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    for row in rows:
        if row.load == load:
            cells = (
                row.policy, _seconds(row.mean), _seconds(row.p95), _seconds(row.mean_first), _seconds(row.p95_first),
                f"{row.preempted:.2f}", f"{row.refused:.2f}",
                f"{100 * row.recomputed:.0f} %", f"{100 * row.busy:.0f} %",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def legend(policies: Sequence[Policy]) -> str:
    """Whose rule each policy is."""
    return "\n".join(f"{policy.name:<18} {policy.stands_for}" for policy in policies)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}"


def plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Mean and 95th percentile over the load, for each policy. Raises `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed", hint="pip install matplotlib, or leave --plot out") from error
    figure = Figure(figsize=(11, 4.5))
    axes = figure.subplots(1, 2)
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row.policy, []).append(row)
    for axis, name, words in zip(axes, ("mean", "p95"), ("mean", "95th percentile"), strict=True):
        for policy, its in by_policy.items():
            its = sorted(its, key=lambda row: row.load)
            values: Mapping[float, float] = {row.load: getattr(row, name) for row in its}
            axis.plot(list(values), list(values.values()), marker="o", label=policy)
        axis.set_yscale("log")
        axis.set_xlabel("load, part of saturation")
        axis.set_ylabel(f"completion of a generation, {words}, s")
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", hint="--plot names a file") from error
    except ValueError as error:  # a suffix that is no format
        raise UserError(str(error), hint="--plot takes a name such as serving.png") from error
