"""Whether a training run in which servers are killed ends with the same adapter as one in which none is."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch

from benchmarks.tuning import Table, Tuner, client, relative_error, tell, tokens_of, whole
from shoal.bundled import STORIES
from shoal.testing import ShapedServer, shaped_swarm

SPANS = ("0:6", "6:12", "0:6", "6:12")
BATCH = 8
"""Sequences: enough microbatches for all servers."""
NUM_STEPS = 50
KILL_EVERY = 10
LEARNING_RATE = 1e-3
LIMIT = 1e-5

Adapter = dict[str, torch.Tensor]


class Moment(Enum):
    """When in a step a server is killed."""

    FORWARD = "in the forward pass"
    BETWEEN = "between the passes"
    BACKWARD = "in the backward pass"


class Run:
    """Training of the same adapter on the same batches, whatever happens to the servers meanwhile."""

    def __init__(self, model: Any) -> None:
        self._tuner = Tuner(model, learning_rate=LEARNING_RATE)
        self.begun_with = self._adapter()
        self._seconds: dict[Moment, list[float]] = {Moment.FORWARD: [], Moment.BACKWARD: []}

    def train(self, disturb: Callable[[int, Moment], Callable[[], None] | None] = lambda step, moment: None) -> Adapter:
        """What comes of it. `disturb` says what is to happen in a moment of a step."""
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
        """Do it; in the middle of it, as long as it usually takes, the event happens."""
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
    """Kills one server after another, each in another moment of a step, and starts it again after the step."""

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
            tell(f"step {step}: {victim.name} ({victim.span}) killed {moment.value}")

        return kill

    @staticmethod
    def num_kills_before(step: int) -> int:
        return step // KILL_EVERY - 1


def difference(found: Adapter, expected: Adapter) -> float:
    """The largest relative error of a factor."""
    return max(relative_error(found[name], each) for name, each in expected.items())


def kills() -> Table:
    local = Run(whole(STORIES, torch.float32)).train()
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
                f"{killer.num_kills} servers killed, against the undisturbed run",
                error,
                f"≤ {LIMIT:g}",
                killer.num_kills == NUM_STEPS // KILL_EVERY and error <= LIMIT,
            ),
            ("(the undisturbed run, against one machine)", difference(undisturbed, local), None, None),
            ("(what it began with, against the undisturbed run)", difference(run.begun_with, undisturbed), None, None),
        ),
    )
