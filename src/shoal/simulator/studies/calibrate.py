"""How near a simulated twin comes to a swarm of real processes behind shaped links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.simulator.steps.twin import Predicted, RealRun, RealSwarm, predict
from shoal.simulator.studies.report import Report, Table

GOAL = 0.1
"""The largest difference, as a part of what was measured."""


@dataclass(frozen=True)
class Compared:
    """A run as measured and as simulated."""

    run: RealRun
    predicted: Predicted

    @property
    def throughput_error(self) -> float:
        """By which part the twin's tokens per second are above those that were measured."""
        return self.predicted.tokens_per_second / self.run.tokens_per_second - 1

    @property
    def latency_error(self) -> float:
        """By which part the twin's time for a token is above the one that was measured."""
        return self.predicted.token_seconds / self.run.token_seconds - 1

    @property
    def agrees(self) -> bool:
        """Whether both errors are within `GOAL`."""
        return max(abs(self.throughput_error), abs(self.latency_error)) <= GOAL


def compare(swarm: RealSwarm) -> list[Compared]:
    """All runs of a swarm."""
    return [Compared(run, predict(swarm, run)) for run in swarm.runs]


def report(swarm: RealSwarm, compared: Sequence[Compared]) -> Report:
    """A row for each run."""
    rows = tuple(
        (
            str(len(each.run.routes)),
            f"{each.run.prompt}, {each.run.answer}",
            f"{each.run.tokens_per_second:.3g}",
            f"{each.predicted.tokens_per_second:.3g}",
            f"{100 * each.throughput_error:+.0f} %",
            f"{1000 * each.run.token_seconds:.4g} ms",
            f"{1000 * each.predicted.token_seconds:.4g} ms",
            f"{100 * each.latency_error:+.0f} %",
            "yes" if each.agrees else "no",
        )
        for each in compared
    )
    headings = ("clients", "prompt, answer", "tokens/s", "twin", "error", "a token", "twin", "error", "within 10 %")
    notes = f"{len(swarm.servers)} server processes, {swarm.num_blocks} blocks, measured on {swarm.machine}."
    return Report("calibrate", "A swarm of processes and its simulated twin", (Table(headings, rows),), notes)


def draw(compared: Sequence[Compared], figure: Any) -> None:
    """Measured and simulated tokens per second, by clients."""
    panel = figure.subplots()
    clients = [len(each.run.routes) for each in compared]
    panel.plot(clients, [each.run.tokens_per_second for each in compared], "o", label="processes")
    panel.plot(clients, [each.predicted.tokens_per_second for each in compared], "x", label="twin")
    panel.set_xlabel("clients")
    panel.set_ylabel("tokens/s")
    panel.legend()
