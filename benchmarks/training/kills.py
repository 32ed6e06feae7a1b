"""Training while servers are killed. It has to end with the same adapter as an undisturbed run."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch

from benchmarks.common.tuning import Table, Tuner, client, local_model, log, relative_error, tokens_of
from shoal.bundled import STORIES
from shoal.testing import ShapedServer, shaped_swarm

SPANS = ("0:6", "6:12", "0:6", "6:12")
BATCH = 8
"""Sequences in a batch: enough microbatches for all servers."""
NUM_STEPS = 50
KILL_EVERY = 10
LEARNING_RATE = 1e-3
LIMIT = 1e-5

Adapter = dict[str, torch.Tensor]


class Moment(Enum):
    """The moment of a step at which a server is killed."""

    FORWARD = "in the forward pass"
    BETWEEN = "between the passes"
    BACKWARD = "in the backward pass"


class Run:
    """Trains an adapter. Each run begins with the same adapter and has the same batches."""

    def __init__(self, model: Any) -> None:
        self._tuner = Tuner(model, learning_rate=LEARNING_RATE)
        self.initial = self._adapter()
        self._seconds: dict[Moment, list[float]] = {Moment.FORWARD: [], Moment.BACKWARD: []}

    def train(self, disturb: Callable[[int, Moment], Callable[[], None] | None] = lambda step, moment: None) -> Adapter:
        """Train, and return the adapter. `disturb` gives the event for a step and a moment, or None."""
        for step in range(1, NUM_STEPS + 1):
            tokens = tokens_of(self._tuner.model, BATCH, seed=step)
            loss = self._during(Moment.FORWARD, disturb(step, Moment.FORWARD), lambda: self._tuner.loss(tokens))  # noqa: B023
            if (event := disturb(step, Moment.BETWEEN)) is not None:
                event()
            self._during(Moment.BACKWARD, disturb(step, Moment.BACKWARD), loss.backward)
            self._tuner.update()
        return self._adapter()

    def _adapter(self) -> Adapter:
        return {name: each.detach().clone() for name, each in self._tuner.parameters.items()}

    def _during(self, moment: Moment, event: Callable[[], None] | None, act: Callable[[], Any]) -> Any:
        """Run `act`, and the event after half of its usual time."""
        if event is None:
            began = time.perf_counter()
            result = act()
            self._seconds[moment].append(time.perf_counter() - began)
            return result
        timer = threading.Timer(statistics.median(self._seconds[moment]) / 2, event)
        timer.start()
        try:
            return act()
        finally:
            timer.join()


class Killer:
    """Kills one server after another, at alternating moments of a step, and restarts it after the step."""

    def __init__(self, servers: Sequence[ShapedServer]) -> None:
        self._servers = servers
        self._killed: ShapedServer | None = None
        self.num_kills = 0

    def __call__(self, step: int, moment: Moment) -> Callable[[], None] | None:
        if self._killed is not None and step % KILL_EVERY == 1 and moment is Moment.FORWARD:
            self._killed.restart(wait=False)
        if step % KILL_EVERY or moment is not list(Moment)[self.num_kills_before(step) % len(Moment)]:
            return None
        if self._killed is not None:
            self._killed.wait_until_ready()
        victim = self._servers[self.num_kills % len(self._servers)]

        def kill() -> None:
            victim.kill()
            self._killed, self.num_kills = victim, self.num_kills + 1
            log(f"step {step}: {victim.name} ({victim.span}) killed {moment.value}")

        return kill

    @staticmethod
    def num_kills_before(step: int) -> int:
        return step // KILL_EVERY - 1


def difference(found: Adapter, expected: Adapter) -> float:
    """The largest relative error of a factor."""
    return max(relative_error(found[name], each) for name, each in expected.items())


def kills() -> Table:
    local = Run(local_model(STORIES, torch.float32)).train()
    with shaped_swarm(STORIES, SPANS, options=["--dtype", "float32"]) as swarm:
        models = [client(STORIES, swarm.addresses, torch.float32) for _ in range(2)]
        try:
            run = Run(models[0])
            undisturbed = run.train()
            killer = Killer(swarm.servers)
            disturbed = Run(models[1]).train(killer)
        finally:
            for model in models:
                model.close()
    error = difference(disturbed, undisturbed)
    return Table(
        f"The adapter after {NUM_STEPS} steps in float32, a SIGKILL every {KILL_EVERY}",
        ("run", "largest relative error of a factor", "goal"),
        (
            (
                f"{killer.num_kills} servers killed, vs. the undisturbed run",
                error,
                f"≤ {LIMIT:g}",
                killer.num_kills == NUM_STEPS // KILL_EVERY and error <= LIMIT,
            ),
            ("(the undisturbed run vs. one machine)", difference(undisturbed, local), None, None),
            ("(the initial adapter vs. the undisturbed run)", difference(run.initial, undisturbed), None, None),
        ),
    )
