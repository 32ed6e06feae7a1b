"""What a quiet swarm climbs: heights, and plans with two moves of which the first one loses a little."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.fleet import Fleet
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import exact_throughput
from shoal.policy.placement.joining import choose_blocks
from shoal.policy.placement.plan import plan_moves
from shoal.policy.placement.refining import RUNG, Refined, is_refinable
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.spans import Span

DAYS_LATER = 1e6
"""A time at which machines that came at 0 make a quiet swarm."""
NUM_BLOCKS = 24


def random_swarm(seed: int, *, count: int = 9, network: bool = True) -> list[Machine]:
    """Machines that hold 1.5 copies of each block or a little more, where joining puts them."""
    rng = random.Random(seed)
    placed: list[Machine] = []
    for index in range(count):
        blocks, speed = rng.randint(3, 6), rng.uniform(50.0, 200.0)
        limit = rng.choice([20.0, 60.0, float("inf")]) if network else float("inf")
        new = Machine(f"s{index}", None, blocks, ((1, speed), (blocks, speed * 0.6)), network_speed=limit)
        placed.append(replace(new, span=choose_blocks(new, placed, NUM_BLOCKS, rng=rng).span))
    return placed


def refined(machines: Sequence[Machine]) -> Refined:
    return Refined.of(ScoredPlacement.of(Fleet.of(machines, NUM_BLOCKS, now=DAYS_LATER), Scoring()))


def settled(machines: Sequence[Machine]) -> list[Machine]:
    """The machines after plan upon plan, until one is empty; checks that blocks that are served stay served."""
    placed = {machine.peer: machine for machine in machines}
    for _ in range(200):
        plan = plan_moves(list(placed.values()), NUM_BLOCKS, now=DAYS_LATER)
        if not plan:
            return list(placed.values())
        for move in plan:
            kept = placed[move.peer].keeps(move.after)
            left = [block for block in move.before if kept is None or block not in kept]
            others = [each.span for each in placed.values() if each.peer != move.peer and each.span is not None]
            assert all(any(block in span for span in others) for block in left), move
            placed[move.peer] = replace(placed[move.peer], span=move.after)
    raise AssertionError("plans do not end")


@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_height_is_what_all_blocks_can_get_at_once_within_two_rungs(seed: int, network: bool):
    machines = random_swarm(seed, network=network)
    bound, exact = throughput_bound(machines, NUM_BLOCKS), exact_throughput(machines, NUM_BLOCKS)
    assert exact - 2 * RUNG * bound <= refined(machines).height <= exact + RUNG * bound


@pytest.mark.parametrize("seed", range(3))
def test_the_height_after_a_change_that_raises_it_is_that_of_the_changed_placement(seed: int):
    machines = random_swarm(seed)
    before = refined(machines)
    rows = np.flatnonzero(before.placement.fleet.lengths > 0)
    starts = np.arange(len(rows)) % (NUM_BLOCKS - 2)
    changes = Changes(rows, starts, starts + 2)
    for index, height in enumerate(before.heights(changes)):
        peer = before.placement.fleet.machines[rows[index]].peer
        span = Span(int(changes.starts[index]), int(changes.ends[index]))
        after = refined([replace(each, span=span) if each.peer == peer else each for each in machines])
        if before.rungs[0] <= after.height < before.rungs[-1]:
            assert height == pytest.approx(after.height)


@pytest.mark.parametrize("seed", range(4))
def test_plans_of_a_quiet_swarm_end_open_no_hole_and_lose_nothing(seed: int):
    machines = random_swarm(seed)
    rested = settled(machines)
    assert exact_throughput(rested, NUM_BLOCKS) >= exact_throughput(machines, NUM_BLOCKS)


def test_where_no_single_move_gains_anything_two_do_of_which_the_first_loses():
    placed = {machine.peer: machine for machine in random_swarm(3)}
    while (plan := plan_moves(list(placed.values()), NUM_BLOCKS, now=DAYS_LATER)) and "can then go" not in plan[
        0
    ].reason:
        placed |= {move.peer: replace(placed[move.peer], span=move.after) for move in plan}
    assert [move.rank for move in plan] == [0, 1]
    assert plan[0].reason == f"{plan[1].peer} can then go to {plan[1].after}"
    scores = [refined(list(placed.values())).score]
    for move in plan:
        placed[move.peer] = replace(placed[move.peer], span=move.after)
        scores.append(refined(list(placed.values())).score)
    assert scores[1] < scores[0] < scores[2]
    first_done = {**placed, plan[1].peer: replace(placed[plan[1].peer], span=plan[1].before)}
    (next_move, *_) = plan_moves(list(first_done.values()), NUM_BLOCKS, now=DAYS_LATER)
    assert (next_move.peer, next_move.after) == (plan[1].peer, plan[1].after), (
        "servers that see the first one done agree"
    )


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 30), st.randoms())
def test_equal_views_of_a_quiet_swarm_give_equal_plans(seed: int, chance: random.Random):
    machines = random_swarm(seed)
    shuffled = chance.sample(machines, len(machines))
    assert plan_moves(shuffled, NUM_BLOCKS, now=DAYS_LATER) == plan_moves(machines, NUM_BLOCKS, now=DAYS_LATER)


def test_swarms_that_are_not_quiet_or_that_are_grouped_have_no_height():
    machines = random_swarm(0)
    assert is_refinable(Fleet.of(machines, NUM_BLOCKS, now=DAYS_LATER))
    assert not is_refinable(Fleet.of([replace(machines[0], count=2), *machines[1:]], NUM_BLOCKS, now=DAYS_LATER))
    came = replace(machines[0], up_since=DAYS_LATER - 60)
    assert not is_refinable(Fleet.of([came, *machines[1:]], NUM_BLOCKS, now=DAYS_LATER))
