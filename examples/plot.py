"""A plot of the loss."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot(losses: dict[str, Sequence[float]], title: str, path: Path) -> None:
    """Plot the loss of each step, one line for each name, and save the plot as `path`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
