"""Where servers serve: bounds, scores, joining, and the shared plan. `test_needed.py` has what machines must keep."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.fleet import ASSUMED_LOSS, Fleet
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs, exact_throughput
from shoal.policy.placement.joining import choose_blocks
from shoal.policy.placement.petals import choose_move
from shoal.policy.placement.plan import Move, plan_moves
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.policy.placement.weakest import SMALL_MACHINES
from shoal.spans import Span

NOW = 1000.0


def machine(peer: str, span: str | None = None, speed: float = 100.0, **more: object) -> Machine:
    """A machine of up to 4 blocks that computes `speed` tokens per second of one block, if it is not said otherwise."""
    place = None if span is None else Span.parse(span)
    values = {"max_blocks": 4, "block_speeds": ((1, speed),), "load_seconds": 1.0, **more}
    return Machine(peer, place, **values)  # type: ignore[arg-type]


@st.composite
def swarms(draw: st.DrawFn, num_blocks: int = 8, most: int = 8, networks: bool = True) -> list[Machine]:
    """Some machines with spans; some load, and keep a part of their blocks meanwhile; some are pinned or in zones.

    Some swarms are larger by machines that have no span yet: in small and in roomy swarms the weakest block counts too.
    """
    found = [machine(f"new{index}", speed=1e-3) for index in range(draw(st.sampled_from([0, SMALL_MACHINES])))]
    for index in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, num_blocks - 1))
        span = Span(start, draw(st.integers(start + 1, min(num_blocks, start + 5))))
        speed = draw(st.sampled_from([20.0, 50.0, 100.0, 300.0]))
        ready_at = draw(st.sampled_from([0.0, 0.0, 0.0, NOW + 30]))
        first = draw(st.integers(span.start, span.end - 1))
        found.append(
            Machine(
                f"server{index}",
                span,
                draw(st.integers(len(span), 5)),
                ((1, speed), (5, speed * draw(st.sampled_from([0.5, 1.0])))),
                network_speed=draw(st.sampled_from([float("inf"), 30.0])) if networks else float("inf"),
                movable=draw(st.sampled_from([True, True, True, False])) and not ready_at,
                ready_at=ready_at,
                kept=draw(st.sampled_from([None, Span(first, span.end)])) if ready_at else None,
                zone=draw(st.sampled_from(["", "here", "there"])),
            )
        )
    return found


def applied(machines: Sequence[Machine], plan: Sequence[Move]) -> list[Machine]:
    """The machines after all moves of a plan, when all have loaded."""
    spans = {move.peer: move.after for move in plan}
    return [replace(each, span=spans.get(each.peer, each.span), ready_at=0.0) for each in machines]


def set_out(machines: Sequence[Machine], plan: Sequence[Move]) -> list[Machine]:
    """The machines while those that the plan moves load, each as others see it then."""
    spans = {move.peer: move.after for move in plan}
    return [_loading(each, spans[each.peer]) if each.peer in spans else each for each in machines]


def _loading(one: Machine, span: Span) -> Machine:
    return replace(one, span=span, kept=one.keeps(span), ready_at=NOW + 60, movable=False)


def served_blocks(machines: Sequence[Machine]) -> set[int]:
    """The blocks that a machine serves now, and goes on serving."""
    return {block for each in machines for block in each.serves or ()}


# Throughput


def test_a_machine_divides_its_time_evenly_among_its_blocks():
    assert block_throughputs([machine("a", "0:4"), machine("b", "3:4", 10)], 5) == [25, 25, 25, 35, 0]


def test_machines_that_share_their_time_freely_carry_more():
    machines = [machine("a", "0:2"), machine("b", "1:3")]
    assert min(block_throughputs(machines, 3)) == 50
    assert exact_throughput(machines, 3) == pytest.approx(200 / 3)


def test_the_network_limits_what_a_machine_does_for_each_block():
    machines = [machine("a", "0:2", 100, network_speed=30.0)]
    assert block_throughputs(machines, 2) == [30, 30]
    assert exact_throughput(machines, 2) == pytest.approx(30)


def test_a_block_without_a_machine_carries_nothing():
    assert exact_throughput([machine("a", "0:2")], 3) == 0
    assert exact_throughput([], 3) == 0


def test_the_bound_takes_the_length_at_which_each_machine_does_most():
    fast_alone = machine("a", None, block_speeds=((1, 100.0), (2, 30.0)), max_blocks=2)
    assert throughput_bound([fast_alone] * 2, 2) == pytest.approx(100)
    assert throughput_bound([fast_alone], 2) == pytest.approx(15)


def poorest(machines: Sequence[Machine], num_blocks: int) -> float:
    """The throughput by Gale's theorem: no set of blocks may need more than all machines can do for it."""
    least = float("inf")
    for size in range(1, num_blocks + 1):
        for blocks in itertools.combinations(range(num_blocks), size):
            able = sum(
                min(each.block_speed(len(each.span)), each.network_speed * sum(block in each.span for block in blocks))
                for each in machines
                if each.span is not None and any(block in each.span for block in blocks)
            )
            least = min(least, able / size)
    return least


@settings(deadline=None)
@given(swarms(num_blocks=6))
def test_the_exact_throughput_is_what_no_set_of_blocks_forbids(machines: list[Machine]):
    assert exact_throughput(machines, 6) == pytest.approx(poorest(machines, 6), rel=1e-6)


@settings(deadline=None)
@given(swarms())
def test_exact_is_between_the_least_block_and_the_bound(machines: list[Machine]):
    exact = exact_throughput(machines, 8)
    assert min(block_throughputs(machines, 8)) <= exact * (1 + 1e-9)
    assert exact <= throughput_bound(machines, 8) * (1 + 1e-9)


@settings(deadline=None)
@given(swarms(), st.integers(2, 5))
def test_machines_that_are_alike_count_as_so_many(machines: list[Machine], count: int):
    several = [replace(each, peer=f"{each.peer}-{copy}") for each in machines for copy in range(count)]
    grouped = [replace(each, count=count) for each in machines]
    assert block_throughputs(grouped, 8) == pytest.approx(block_throughputs(several, 8))
    assert exact_throughput(grouped, 8) == pytest.approx(exact_throughput(several, 8))
    assert throughput_bound(grouped, 8) == pytest.approx(throughput_bound(several, 8))


# Joining


def joins(one: Machine, others: Sequence[Machine], num_blocks: int, **more: object) -> Span:
    return choose_blocks(one, others, num_blocks, rng=random.Random(0), **more).span  # type: ignore[arg-type]


def test_a_machine_joins_where_the_blocks_are_slowest():
    others = [machine("a", "0:4", 400), machine("b", "0:4", 400), machine("c", "4:8", 40), machine("d", "4:8", 40)]
    assert joins(machine("new"), others, 8) == Span(4, 8)


def test_it_takes_fewer_blocks_where_fewer_need_it():
    others = [machine("a", "0:4", 400), machine("b", "0:4", 400), machine("c", "4:6", 20), machine("d", "4:6", 20)]
    assert joins(machine("new"), others, 6) == Span(4, 6)
    assert len(joins(machine("new"), others, 6, min_blocks=3)) == 3


def test_petals_takes_as_many_blocks_as_fit():
    others = [machine("a", "0:4", 400), machine("b", "0:4", 400), machine("c", "4:6", 20), machine("d", "4:6", 20)]
    assert joins(machine("new"), others, 6, rule="petals") == Span(2, 6)


def test_a_machine_that_joins_says_why():
    others = [machine("a", "0:3"), machine("b", "3:6", 20)]
    assert choose_blocks(machine("new"), others, 8, rng=random.Random(0)).reason == "blocks 6:8 had no server"
    full = [*others, machine("c", "6:8", 200)]
    assert choose_blocks(machine("new"), full, 8, rng=random.Random(0)).reason.startswith("blocks 3:6 carried 6.67 ")


@settings(deadline=None)
@given(swarms(), st.integers(1, 8), st.integers(0, 3))
def test_a_machine_that_joins_fills_as_many_holes_as_it_can(machines: list[Machine], most: int, seed: int):
    holes = {block for block, speed in enumerate(block_throughputs(machines, 8)) if speed == 0}
    span = choose_blocks(machine("new", max_blocks=most), machines, 8, rng=random.Random(seed)).span
    fillable = max(len(holes & set(range(start, start + most))) for start in range(8 - most + 1))
    assert len(span) <= most
    assert len(holes & set(span)) == fillable


@pytest.mark.parametrize("seed", range(20))
def test_machines_that_join_one_after_another_leave_no_gap_that_none_fits(seed: int):
    placed: list[Machine] = []
    for index in range(4):
        one = machine(f"server{index}", max_blocks=8)
        placed.append(replace(one, span=choose_blocks(one, placed, 30, rng=random.Random(seed)).span))
    assert served_blocks(placed) == set(range(30))


# The plan


def test_a_machine_moves_to_blocks_without_a_server():
    machines = [machine("a", "0:4"), machine("b", "0:4"), machine("c", "0:4")]
    move = plan_moves(machines, 8, now=NOW)[0]
    assert (move.peer, move.after, move.fills, move.rank) == ("a", Span(4, 8), (4, 5, 6, 7), 0)
    assert move.reason == "blocks 4:8 had no server"


def test_a_machine_moves_to_slow_blocks_and_says_so():
    machines = [
        *(machine(f"fast{i}", "0:4", 100) for i in range(5)),
        *(machine(f"slow{i}", "4:8", 40) for i in range(2)),
    ]
    move = plan_moves(machines, 8, now=NOW)[0]
    assert move.peer == "fast0"
    assert move.reason.endswith("carried 20 tokens/s, 0:4 carried 125")


def test_nothing_moves_in_a_swarm_that_is_balanced():
    machines = [machine(f"{place}{i}", place) for place in ("0:4", "4:8") for i in range(3)]
    assert plan_moves(machines, 8, now=NOW) == ()


def test_a_machine_does_not_move_if_loading_loses_more_than_the_move_gains():
    machines = [
        *(machine(f"fast{i}", "0:4", 100) for i in range(5)),
        *(machine(f"slow{i}", "4:8", 40) for i in range(2)),
    ]
    slow = [replace(each, load_seconds=601.0) for each in machines]  # even one block takes the ten minutes
    assert plan_moves(machines, 8, now=NOW)
    assert plan_moves(slow, 8, now=NOW) == ()


def test_a_hole_is_filled_even_if_loading_takes_long():
    machines = [machine(f"s{i}", "0:4", load_seconds=140.0) for i in range(3)]
    assert plan_moves(machines, 8, now=NOW)[0].fills == (4, 5, 6, 7)


def test_of_equal_machines_the_one_moves_that_has_the_blocks_on_its_disk():
    machines = [machine(f"s{i}", "0:4", load_seconds=30.0) for i in range(3)]
    machines[1] = replace(machines[1], on_disk=(Span(4, 8),))
    assert plan_moves(machines, 8, now=NOW)[0].peer == "s1"


def test_a_server_that_loads_a_hole_is_waited_for():
    machines = [machine("a", "0:4"), machine("b", "0:4"), machine("c", "4:8", ready_at=NOW + 30, movable=False)]
    assert not any(move.fills for move in plan_moves(machines, 8, now=NOW))


def test_a_server_that_claims_other_blocks_does_not_count_where_it_still_serves():
    claims = [machine("a", "0:4"), machine("a", "4:8", ready_at=NOW + 30, movable=False)]
    assert plan_moves([*claims, machine("b", "0:4"), machine("c", "8:12", ready_at=NOW + 30)], 12, now=NOW) == ()


def test_pinned_servers_stay():
    machines = [machine(f"s{i}", "0:4", movable=False) for i in range(3)]
    assert plan_moves(machines, 8, now=NOW) == ()


def test_where_no_machine_came_for_a_day_throughput_counts_for_more_than_danger():
    machines = [machine("a", "0:4"), machine("b", "0:4"), machine("c", "4:8"), machine("d", "4:8")]
    quiet = Fleet.of(machines, 8, now=1e6)
    assert quiet.losses.max() < 0.01
    came = Fleet.of([*machines[:3], replace(machines[3], up_since=1e6 - 60)], 8, now=1e6)
    assert set(came.losses) == {ASSUMED_LOSS}


def test_the_score_knows_that_a_network_limits_what_a_machine_does_for_one_block():
    machines = [machine("a", "0:4", 100, network_speed=30.0), machine("b", "1:4", 1000)]
    placement = ScoredPlacement.of(Fleet.of(machines, 4, now=NOW), Scoring())
    assert placement.exact_sums(Changes.none(), np.array([50.0]))[0, 0] == 30 + 3 * 50


def test_no_machines_make_no_plan():
    assert plan_moves([], 8, now=NOW) == ()


@settings(deadline=None, max_examples=200)
@given(swarms())
def test_no_plan_opens_a_hole_whichever_of_its_servers_load(machines: list[Machine]):
    plan = plan_moves(machines, 8, now=NOW)
    for some in itertools.product([True, False], repeat=len(plan)):
        loading = set_out(machines, list(itertools.compress(plan, some)))
        assert served_blocks(loading) >= served_blocks(machines)


@settings(deadline=None, max_examples=200)
@given(swarms())
def test_a_server_gives_up_only_blocks_that_a_plausible_server_keeps_by_the_same_plan(machines: list[Machine]):
    plan = plan_moves(machines, 8, now=NOW)
    fleet = Fleet.of(machines, 8, now=NOW)
    doubted = {one.peer for one, flag in zip(fleet.machines, fleet.doubted, strict=True) if flag}
    whole = {one.peer for one, flag in zip(fleet.machines, fleet.whole, strict=True) if flag}
    loading = set_out(machines, plan)
    for move in plan:
        relied = [one for one in loading if one.peer not in (whole if move.fills else doubted)]
        own = next(one for one in loading if one.peer == move.peer)
        assert set(move.before) - set(own.kept or ()) <= served_blocks([one for one in relied if one is not own])


def test_the_only_server_of_a_block_takes_more_blocks_if_it_has_room_for_all_of_them():
    machines = [machine("a", "0:2"), machine("b", "4:8", movable=False)]
    move = plan_moves(machines, 8, now=NOW)[0]
    assert (move.peer, move.after, move.fills) == ("a", Span(0, 4), (2, 3))
    assert plan_moves([replace(machines[0], max_blocks=2), machines[1]], 8, now=NOW) == ()


@settings(deadline=None)
@given(swarms(), st.randoms())
def test_equal_views_give_equal_plans(machines: list[Machine], rng: random.Random):
    plan = plan_moves(machines, 8, now=NOW)
    rng.shuffle(machines)
    assert plan_moves(machines, 8, now=NOW) == plan


@settings(deadline=None)
@given(swarms(num_blocks=12, most=10))
def test_plans_end(machines: list[Machine]):
    seen = set()
    while plan := plan_moves(machines, 12, now=NOW):
        placement = frozenset((each.peer, each.span) for each in machines)
        assert placement not in seen
        seen.add(placement)
        machines = applied(machines, plan)


@settings(deadline=None)
@given(swarms())
def test_every_move_is_within_the_model_and_the_machine(machines: list[Machine]):
    longest = {each.peer: each.max_blocks for each in machines}
    movable = {each.peer for each in machines if each.movable}
    plan = plan_moves(machines, 8, now=NOW)
    assert [move.rank for move in plan] == list(range(len(plan)))
    for move in plan:
        assert move.after.end <= 8
        assert len(move.after) <= longest[move.peer]
        assert move.before != move.after
        assert move.peer in movable
        assert move.gain > 0


@settings(deadline=None)
@given(swarms())
def test_moves_that_fill_holes_come_first(machines: list[Machine]):
    fills = [bool(move.fills) for move in plan_moves(machines, 8, now=NOW)]
    assert fills == sorted(fills, reverse=True)


@settings(deadline=None)
@given(swarms(networks=False), st.integers(2, 3))
def test_plans_for_groups_are_those_for_machines_that_are_alike(machines: list[Machine], count: int):
    several = [replace(each, peer=f"{each.peer}-{copy}") for each in machines for copy in range(count)]
    grouped = [replace(each, count=count) for each in machines]
    by_machine = [(move.before, move.after, move.fills) for move in plan_moves(several, 8, now=NOW)]
    assert [(move.before, move.after, move.fills) for move in plan_moves(grouped, 8, now=NOW)] == by_machine


@settings(deadline=None)
@given(swarms(), st.sampled_from([1.0, 100.0, 1e9]), st.sampled_from(["", "here"]))
def test_a_liar_who_claims_everything_moves_nobody_off_the_blocks_that_only_the_liar_claims(
    machines: list[Machine], speed: float, zone: str
):
    liar = Machine("liar", Span(0, 8), 8, ((1, speed),), zone=zone)
    plan = plan_moves([*machines, liar], 8, now=NOW)
    assert served_blocks(set_out(machines, plan)) == served_blocks(machines)


def test_beside_a_liar_slow_blocks_are_still_helped():
    machines = [
        *(machine(f"fast{i}", "0:4", 100) for i in range(5)),
        *(machine(f"slow{i}", "4:8", 40) for i in range(2)),
    ]
    liar = Machine("liar", Span(0, 8), 8, ((1, 1e9),))
    assert joins(machine("new"), [*machines, liar], 8) == Span(4, 8)


# PETALS' moving rule


def test_petals_moves_for_a_fifth_of_the_bottleneck_and_not_for_less():
    machines = [*(machine(f"fast{i}", "0:4") for i in range(4)), machine("slow", "4:8")]
    assert choose_move(machines, "fast0", 8, rng=random.Random(0)) == Span(4, 8)
    balanced = [*(machine(f"fast{i}", "0:4") for i in range(3)), *(machine(f"slow{i}", "4:8") for i in range(3))]
    assert choose_move(balanced, "fast0", 8, rng=random.Random(0)) is None


def test_petals_never_leaves_a_hole():
    machines = [machine("a", "0:4"), machine("b", "0:2", 900)]
    assert choose_move(machines, "a", 8, rng=random.Random(0)) is None
