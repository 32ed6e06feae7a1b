"""In small and in roomy swarms, moves also raise the speed of the weakest block."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.fleet import Fleet
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs, exact_throughput
from shoal.policy.placement.plan import plan_moves
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.policy.placement.weakest import ENOUGH, ROOMY_MACHINES, SMALL_MACHINES, Weakest, is_roomy, is_small
from shoal.spans import Span

NOW = 1000.0
NUM_BLOCKS = 80


def alike(spans: Sequence[tuple[int, int]], *, max_blocks: int) -> list[Machine]:
    """Machines of one kind, each of a zone of its own, as fast with many blocks as with one."""
    return [
        Machine(f"s{index:02d}", Span(*span), max_blocks, ((1, 6000.0),), zone=f"zone{index}", up_since=NOW - 600.0)
        for index, span in enumerate(spans)
    ]


def weakest_share(machines: Sequence[Machine]) -> float:
    return min(block_throughputs(machines, NUM_BLOCKS)) / throughput_bound(machines, NUM_BLOCKS)


def exact_share(machines: Sequence[Machine]) -> float:
    return exact_throughput(machines, NUM_BLOCKS) / throughput_bound(machines, NUM_BLOCKS)


def settled(machines: Sequence[Machine]) -> tuple[list[Machine], int]:
    """The machines when plans are empty, and how many moves that took."""
    placed, num_moves = list(machines), 0
    while plan := plan_moves(placed, NUM_BLOCKS, now=NOW):
        spans = {move.peer: move.after for move in plan}
        placed = [replace(each, span=spans.get(each.peer, each.span)) for each in placed]
        num_moves += len(plan)
        assert num_moves < 50, "plans do not end"
    return placed, num_moves


FIVE_OF_A_TRACE = alike([(0, 71), (0, 71), (9, 80), (9, 80), (51, 80)], max_blocks=71)


def test_machines_that_carry_the_bound_still_move_for_the_weakest_block():
    assert exact_share(FIVE_OF_A_TRACE) > 0.99
    assert weakest_share(FIVE_OF_A_TRACE) < 0.5
    after, num_moves = settled(FIVE_OF_A_TRACE)
    assert num_moves == 1
    assert weakest_share(after) > 0.75
    assert exact_share(after) > 0.98
    held = [sum(block in (each.span or ()) for each in after) for block in range(NUM_BLOCKS)]
    assert min(held) >= 2


def test_a_swarm_is_small_up_to_so_many_machines_and_while_they_come_and_go():
    machines = alike([(0, 40), (40, 80)] * (SMALL_MACHINES // 2), max_blocks=40)
    assert is_small(Fleet.of(machines, NUM_BLOCKS, now=NOW))
    assert not is_small(Fleet.of([*machines, replace(machines[0], peer="more")], NUM_BLOCKS, now=NOW))
    assert not is_small(Fleet.of([replace(machines[0], count=SMALL_MACHINES + 1)], NUM_BLOCKS, now=NOW))
    assert not is_small(Fleet.of(machines, NUM_BLOCKS, now=NOW + 1e6))


SIX_OF_EACH_BUT_THE_MIDDLE = [(0, 20)] * 6 + [(20, 40)] * 2 + [(40, 60)] * 6 + [(60, 80)] * 6


def test_in_a_roomy_swarm_moves_end_when_the_weakest_block_has_enough():
    before = alike(SIX_OF_EACH_BUT_THE_MIDDLE, max_blocks=20)
    assert is_roomy(Fleet.of(before, NUM_BLOCKS, now=NOW))
    assert weakest_share(before) < 0.5
    after, num_moves = settled(before)
    assert weakest_share(after) >= ENOUGH
    assert num_moves <= 3


def test_a_swarm_is_roomy_by_the_blocks_with_which_its_machines_compute_most():
    machines = alike(SIX_OF_EACH_BUT_THE_MIDDLE, max_blocks=20)
    slow_when_full = [replace(each, block_speeds=((1, 6000.0), (20, 2000.0))) for each in machines]
    for others in (
        machines[:15],
        slow_when_full,
        [*machines, replace(machines[0], peer="more", count=ROOMY_MACHINES)],
    ):
        assert not is_roomy(Fleet.of(others, NUM_BLOCKS, now=NOW))
    assert not is_roomy(Fleet.of(machines, NUM_BLOCKS, now=NOW + 1e6))


@pytest.mark.parametrize("seed", range(5))
def test_the_weakest_block_after_a_change_is_that_of_the_changed_placement(seed: int):
    rng = random.Random(seed)
    spans = [(start, rng.randint(start + 1, start + 30)) for start in (rng.randrange(50) for _ in range(9))]
    machines = [*alike(spans, max_blocks=40), *(replace(each, peer="rest") for each in alike([(0, 80)], max_blocks=80))]
    fleet = Fleet.of(machines, NUM_BLOCKS, now=NOW)
    placement = ScoredPlacement.of(fleet, Scoring())
    rows = np.arange(len(spans)) + 1  # the first by name is "rest"
    starts = np.array([rng.randrange(40) for _ in spans])
    speeds = Weakest(placement).speeds(Changes(rows, starts, starts + 40))
    for row, start, speed in zip(rows, starts.tolist(), speeds, strict=True):
        peer = fleet.machines[row].peer
        moved = [replace(each, span=Span(start, start + 40)) if each.peer == peer else each for each in machines]
        assert speed == pytest.approx(min(placement.bound, *block_throughputs(moved, NUM_BLOCKS)))
