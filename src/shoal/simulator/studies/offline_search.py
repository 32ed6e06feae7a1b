"""An offline search for good placements: what could be found with much time and a view of everything.

It asks for a level of throughput and moves machines at random, as simulated annealing does, until every block gets that
much; then it asks for more.
"""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import exact_throughput
from shoal.spans import Span

FIRST_LEVEL = 0.5
"""The part of the bound that is asked for at first, if the placement to begin with has not more."""
RAISE = 0.01
"""By which part of the bound more is asked for, once a level is reached."""


@dataclass(frozen=True)
class Found:
    """The best placement that was found, and its exact throughput."""

    machines: tuple[Machine, ...]
    exact: float


def search(machines: Sequence[Machine], num_blocks: int, *, num_tries: int, rng: random.Random) -> Found:
    """The best placement after `num_tries` tried moves. Machines without a span begin anywhere."""
    placed = [machine if machine.span is not None else _anywhere(machine, num_blocks, rng) for machine in machines]
    bound = throughput_bound(placed, num_blocks)
    best = Found(tuple(placed), exact_throughput(placed, num_blocks))
    if not bound or not placed:
        return best
    goal = max(FIRST_LEVEL * bound, best.exact + RAISE * bound)
    lacks = deficits(placed, num_blocks, goal)
    total = sum(lacks)
    for tried in range(num_tries):
        heat = 0.02 * goal * num_blocks * (1 - tried / num_tries) ** 2 / len(placed)
        index = rng.randrange(len(placed))
        before = placed[index]
        placed[index] = replace(before, span=_proposal(before, lacks, num_blocks, rng))
        new = deficits(placed, num_blocks, goal)
        change = sum(new) - total
        if change <= 0 or (heat > 0 and rng.random() < math.exp(-change / heat)):
            lacks, total = new, total + change
        else:
            placed[index] = before
        if total <= 1e-9 * goal:
            best = Found(tuple(placed), exact_throughput(placed, num_blocks))
            goal = best.exact + RAISE * bound
            if best.exact >= bound * (1 - 1e-6):
                break
            lacks = deficits(placed, num_blocks, goal)
            total = sum(lacks)
    return best


def deficits(machines: Sequence[Machine], num_blocks: int, level: float) -> list[float]:
    """What each block lacks of `level` tokens per second, if servers share their time as well as they can.

    From the first block on, each is served by the machines whose spans end first: the others can help later. Where
    networks limit what machines do for one block, another order may lack less.
    """
    starting: list[list[Machine]] = [[] for _ in range(num_blocks)]
    for machine in machines:
        if machine.span is not None:
            starting[machine.span.start].append(machine)
    active: list[tuple[int, int, float, float]] = []  # end, a number, capacity left, network
    lacks: list[float] = []
    number = 0
    for block in range(num_blocks):
        for machine in starting[block]:
            assert machine.span is not None
            length = len(machine.span)
            number += 1
            insort(active, (machine.span.end, number, machine.speed(length) * length, machine.network_speed))
        needed = level
        still: list[tuple[int, int, float, float]] = []
        for end, order, left, network in active:
            if end <= block:
                continue
            given = min(left, network, needed)
            needed -= given
            if left - given > 0 and end > block + 1:
                still.append((end, order, left - given, network))
        active = still
        lacks.append(needed if needed > 1e-12 * level else 0.0)
    return lacks


def _anywhere(machine: Machine, num_blocks: int, rng: random.Random) -> Machine:
    length = min(machine.max_blocks, num_blocks)
    start = rng.randint(0, num_blocks - length)
    return replace(machine, span=Span(start, start + length))


def _proposal(machine: Machine, lacks: Sequence[float], num_blocks: int, rng: random.Random) -> Span:
    """Another span for a machine: mostly one over a block that lacks something, sometimes one that is a little off."""
    longest = min(machine.max_blocks, num_blocks)
    assert machine.span is not None
    if rng.random() < 0.3:
        length = min(longest, max(1, len(machine.span) + rng.choice((-1, 0, 1))))
        start = machine.span.start + rng.choice((-1, 0, 1))
    else:
        length = rng.randint(max(1, longest // 3), longest)
        short = [block for block, lack in enumerate(lacks) if lack]
        block = rng.choice(short) if short and rng.random() < 0.8 else rng.randrange(num_blocks)
        start = block - rng.randrange(length)
    start = min(max(0, start), num_blocks - length)
    return Span(start, start + length)
