"""Other systems' rules, and the offline search that all are compared with."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs, exact_throughput
from shoal.policy.placement.petals import choose_move
from shoal.simulator.fluid.rules import STAY
from shoal.simulator.others.central import allocation
from shoal.simulator.others.greedy_chains import greedy_chains
from shoal.simulator.others.lightest import lightest_span
from shoal.simulator.others.parallax import fill, parallax, water_fill
from shoal.simulator.others.petals_moves import Petals, may_gain
from shoal.simulator.studies.offline_search import deficits, search
from shoal.simulator.world.hardware import draw_swarm
from shoal.spans import Span

NUM_BLOCKS = 12


def swarm(seed: int, *, num_machines: int = 8, copies: float = 2.0, placed: bool = True) -> list[Machine]:
    """A random swarm; placed at random, or not."""
    rng = random.Random(seed)
    machines = []
    for index, hardware in enumerate(draw_swarm(rng, num_machines=num_machines, num_blocks=NUM_BLOCKS, copies=copies)):
        start = rng.randint(0, NUM_BLOCKS - hardware.max_blocks)
        span = Span(start, start + hardware.max_blocks) if placed else None
        machines.append(hardware.machine(f"s{index}", span))
    return machines


def simple(peer: str, blocks: int, span: Span | None = None, speed: float = 1.0) -> Machine:
    return Machine(peer, span, blocks, ((1, speed * blocks),))


def test_a_petals_server_looks_now_and_then_and_moves_where_the_swarm_is_weakest():
    crowd = [simple(f"s{index}", 6, Span(0, 6)) for index in range(4)]
    last = simple("t", 6, Span(6, 12))
    steward = Petals().steward("s0", 12, random.Random(0))
    assert steward is not None
    first = steward.look(crowd[0], [*crowd[1:], last], now=0.0)
    assert first.goes is None
    assert first.look_at is not None
    assert steward.look(crowd[0], [*crowd[1:], last], now=first.look_at - 1) == STAY
    assert steward.look(crowd[0], [*crowd[1:], last], now=first.look_at).goes == Span(6, 12)


@given(st.integers(0, 10_000))
@settings(deadline=None)
def test_a_petals_server_that_cannot_gain_enough_is_not_asked_in_vain(seed):
    machines = swarm(seed, copies=3.0)
    if not may_gain(machines, NUM_BLOCKS):
        for machine in machines:
            assert choose_move(machines, machine.peer, NUM_BLOCKS, rng=random.Random(seed)) is None


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 9)), min_size=1, max_size=9), st.data())
def test_water_filling_gives_everything_within_limits(machines, data):
    powers, limits = zip(*machines, strict=True)
    total = data.draw(st.integers(0, sum(limits)))
    lengths = water_fill(powers, limits, total)
    assert sum(lengths) == total
    assert all(0 <= length <= limit for length, limit in zip(lengths, limits, strict=True))


def test_a_pipeline_gives_fast_machines_more_blocks():
    spans = fill([simple("slow", 9, speed=1), simple("fast", 9, speed=3)], 12)
    assert spans == {"slow": Span(0, 3), "fast": Span(3, 12)}


@pytest.mark.parametrize("allocate", [parallax, greedy_chains])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=30)
def test_an_allocation_covers_the_model_and_places_every_machine_within_its_room(allocate, seed):
    machines = swarm(seed, placed=False)
    spans = allocation(allocate, machines, NUM_BLOCKS)
    assert spans.keys() == {machine.peer for machine in machines}
    assert all(len(spans[machine.peer]) <= machine.max_blocks for machine in machines)
    placed = [replace(machine, span=spans[machine.peer]) for machine in machines]
    assert min(block_throughputs(placed, NUM_BLOCKS)) > 0


def test_parallax_makes_as_many_pipelines_as_pay():
    machines = [simple(f"s{index}", 6) for index in range(4)]
    spans = parallax(machines, 12)
    assert sorted(spans.values()) == [Span(0, 6), Span(0, 6), Span(6, 12), Span(6, 12)]


def test_a_newcomer_begins_at_the_lightest_block():
    others = [simple("a", 4, Span(0, 4)), simple("b", 6, Span(6, 12))]
    assert lightest_span(simple("c", 4), others, 12) == Span(4, 8)
    assert lightest_span(simple("c", 4), [simple("a", 10, Span(0, 10))], 12) == Span(8, 12)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_the_search_reckons_like_the_live_measure(seed):
    machines = [replace(machine, network_speed=math.inf) for machine in swarm(seed)]
    exact = exact_throughput(machines, NUM_BLOCKS)
    assert sum(deficits(machines, NUM_BLOCKS, exact)) == pytest.approx(0, abs=1e-6 * max(1.0, exact))
    if exact:
        assert sum(deficits(machines, NUM_BLOCKS, 1.01 * exact)) > 0


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_the_search_never_reckons_more_than_the_live_measure_where_networks_limit(seed):
    machines = swarm(seed)
    if exact := exact_throughput(machines, NUM_BLOCKS):
        assert sum(deficits(machines, NUM_BLOCKS, 1.01 * exact)) > 0


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_search_is_never_worse_than_its_beginning_nor_above_the_bound(seed):
    machines = swarm(seed)
    found = search(machines, NUM_BLOCKS, num_tries=500, rng=random.Random(seed))
    assert found.exact >= exact_throughput(machines, NUM_BLOCKS)
    assert found.exact <= throughput_bound(machines, NUM_BLOCKS) * (1 + 1e-6)
    assert [each.peer for each in found.machines] == [each.peer for each in machines]
    assert all(each.span is not None and len(each.span) <= each.max_blocks for each in found.machines)


def test_a_search_finds_an_optimum_that_is_known():
    machines = [simple(f"s{index}", 4) for index in range(6)]
    found = search(machines, 12, num_tries=4000, rng=random.Random(0))
    assert found.exact == pytest.approx(throughput_bound(machines, 12), rel=0.01)
