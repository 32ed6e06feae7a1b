"""Systems with a central scheduler that places all servers at once, as rules for a swarm that changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from shoal.policy.machines.machine import Machine
from shoal.simulator.fluid.rules import STAY, Decision, Steward
from shoal.simulator.others.lightest import lightest_span
from shoal.spans import Span

Allocate = Callable[[Sequence[Machine], int], Mapping[str, Span]]
"""Spans by peer, from the machines and the number of blocks. A machine without a span is placed like a newcomer."""


class Central:
    """All servers are placed anew when a block has no server; between that, newcomers go to the lightest blocks.

    That is what Parallax does (arXiv 2509.26182); the same is done with other algorithms for all servers at once, whose
    papers leave changes open.
    """

    def __init__(self, name: str, allocate: Allocate) -> None:
        self.name = name
        self._allocate = allocate
        self._last: tuple[frozenset[object], dict[str, Span]] | None = None

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        return lightest_span(machine, others, num_blocks)

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return CentralSteward(num_blocks, self)

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        return None

    def allocation(self, machines: Sequence[Machine], num_blocks: int) -> dict[str, Span]:
        """The span of every machine, computed once for a view that many servers have."""
        seen = frozenset((machine.peer, machine.span, machine.ready_at) for machine in machines)
        if self._last is None or self._last[0] != seen:
            self._last = (seen, allocation(self._allocate, machines, num_blocks))
        return self._last[1]


class CentralSteward:
    """Does the server's part of the allocation that the scheduler computes from the same view."""

    def __init__(self, num_blocks: int, scheduler: Central) -> None:
        self._num_blocks = num_blocks
        self._scheduler = scheduler

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        machines = (own, *others)
        held = [False] * self._num_blocks
        for machine in machines:
            if machine.span is not None:
                held[machine.span.start : machine.span.end] = [True] * len(machine.span)
        if all(held):
            return STAY
        span = self._scheduler.allocation(machines, self._num_blocks)[own.peer]
        return STAY if span == own.span else Decision(goes=span)

    def arrived(self, *, now: float) -> None:
        """The scheduler sees it in the directory."""


def allocation(allocate: Allocate, machines: Sequence[Machine], num_blocks: int) -> dict[str, Span]:
    """The span of every machine: those that the algorithm leaves out go to the lightest blocks, the largest first."""
    spans = dict(allocate(machines, num_blocks))
    placed = [replace(machine, span=spans[machine.peer]) for machine in machines if machine.peer in spans]
    left = [machine for machine in machines if machine.peer not in spans]
    for machine in sorted(left, key=lambda each: (-each.max_blocks, each.peer)):
        spans[machine.peer] = lightest_span(machine, placed, num_blocks)
        placed.append(replace(machine, span=spans[machine.peer]))
    return spans
