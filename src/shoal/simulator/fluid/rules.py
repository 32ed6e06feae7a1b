"""What a simulated server asks when it decides where to serve: the interface, and the rules of the live servers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from shoal.policy.claims import uncovered
from shoal.policy.machines.lifetime import Lifetimes, Lives
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.policy.placement.joining import choose_blocks
from shoal.policy.placement.mover import Mover, Planner, shared_plan
from shoal.policy.placement.petals import choose_span
from shoal.policy.placement.plan import Move
from shoal.spans import Span


@dataclass(frozen=True)
class Decision:
    """What a server does after it has looked at the swarm.

    It `claims` a span: it announces itself as joining there, while it still serves. It `goes` to a span: it moves now.
    `None` for nothing; a server that does not claim any more announces again where it is. It looks again at the time
    `look_at`, and when it reads the directory the next time.
    """

    claims: Span | None = None
    goes: Span | None = None
    look_at: float | None = None


STAY = Decision()


class Steward(Protocol):
    """Decides for one server that is online."""

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        """After the server has seen these others. `own` is where it serves, whatever it claims."""

    def arrived(self, *, now: float) -> None:
        """The server has moved, and is online again."""


class Rule(Protocol):
    """A way to choose blocks when a server starts, and to move later."""

    @property
    def name(self) -> str:
        """The name in tables."""

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        """The span that a new server takes; `machine.span` is `None`."""

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        """What decides for a server that is online; `None` if it never moves."""

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        """The servers that would do something after this view, `None` if all have to be asked."""


@dataclass(frozen=True)
class Never:
    """The server chooses by PETALS' rule when it starts, and stays there: what shoal did before it moved servers."""

    name: str = "no moves"

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        return petals_span(machine, others, num_blocks)

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return None

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        return frozenset()


@dataclass(frozen=True)
class Graded:
    """The server chooses by the graded score when it starts, and stays there."""

    name: str = "graded joining"

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        return choose_blocks(machine, others, num_blocks, rng=rng).span

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return None

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        return frozenset()


class SharedPlan:
    """The live rule: graded joining, and every server does its own steps of the plan that all compute.

    With `predicts`, the plan weighs blocks by how long their holders are expected to stay. What was seen of machines
    that came and went is then the same for all servers, as if each had been there from the beginning.

    A `selective` one asks after a view only the servers that the plan of that view names, for the others would stay:
    that makes large swarms possible.
    """

    def __init__(self, *, predicts: bool = False, selective: bool = False) -> None:
        self.name = "shared plan, prediction" if predicts else "shared plan"
        self.selective = selective
        self._planner = RememberingPlanner()
        self._lives = Lives() if predicts else None
        self._lifetimes: Lifetimes | None = None
        self._learned_at = float("-inf")

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        lifetimes = self._lifetimes
        when = math.inf if lifetimes is None else now  # as the live server does it; ages need a time
        return choose_blocks(machine, others, num_blocks, rng=rng, now=when, lifetimes=lifetimes).span

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return MoverSteward(Mover(peer, num_blocks, planner=self._planner), self)

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        if not self.selective:
            return None
        lifetimes = self.learned(machines, now=now)
        return {move.peer for move in self._planner(machines, num_blocks, now, lifetimes)}

    @property
    def num_plans(self) -> int:
        """How many different plans were computed."""
        return self._planner.num_plans

    def learned(self, machines: Sequence[Machine], *, now: float) -> Lifetimes | None:
        """What is known of lives after another view."""
        if self._lives is not None and now >= self._learned_at + LEARN_SECONDS:
            self._learned_at = now
            self._lives = self._lives.after_view(machines, now)
            self._lifetimes = self._lives.lifetimes(now)
        return self._lifetimes


LEARN_SECONDS = 10.0
"""Seconds between two estimates of lives."""
REMEMBER_SECONDS = 5.0
"""Equal views that are no further apart than this have equal plans, as far as times matter to them."""


class RememberingPlanner:
    """The shared plan, computed once for all servers whose views are equal."""

    def __init__(self, planner: Planner = shared_plan) -> None:
        self.num_plans = 0
        self._plan = planner
        self._plans: dict[tuple[int, frozenset[object]], tuple[Move, ...]] = {}
        self._period = 0

    def __call__(
        self, machines: Sequence[Machine], num_blocks: int, now: float, lifetimes: Lifetimes | None
    ) -> tuple[Move, ...]:
        period = int(now // REMEMBER_SECONDS)
        if period != self._period:
            self._period = period
            self._plans.clear()
        key = (num_blocks, frozenset((each.peer, each.span, each.ready_at, each.movable) for each in machines))
        if key not in self._plans:
            self.num_plans += 1
            self._plans[key] = self._plan(machines, num_blocks, now, lifetimes)
        return self._plans[key]


class MoverSteward:
    """Drives the live state machine."""

    def __init__(self, mover: Mover, rule: SharedPlan) -> None:
        self._mover = mover
        self._rule = rule

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        machines = (own, *others)
        lifetimes = self._rule.learned(machines, now=now)
        self._mover = self._mover.after_view(machines, now=now, lifetimes=lifetimes)
        move = self._mover.move
        if move is None:
            return Decision(claims=self._mover.claim, look_at=self._mover.next_look_at)
        if own.span is not None and uncovered(own.span, own.keeps(move.after), others):  # the live server's last look
            self._mover = self._mover.failed(now=now)
            return Decision(look_at=self._mover.next_look_at)
        return Decision(goes=move.after)

    def arrived(self, *, now: float) -> None:
        self._mover = self._mover.arrived(now=now)


def petals_span(machine: Machine, others: Sequence[Machine], num_blocks: int) -> Span:
    """Where PETALS puts a new server: as many blocks as fit, where the swarm is weakest."""
    return choose_span(block_throughputs(others, num_blocks), num_blocks=min(machine.max_blocks, num_blocks))
