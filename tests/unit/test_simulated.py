"""The simulated swarm of `benchmarks/routing.py`: what it charges a pass, and what routes get of a full swarm."""

from __future__ import annotations

import random

import pytest

from benchmarks.common.simulated import (
    SATURATED_ROWS,
    Simulated,
    Traffic,
    pass_seconds,
    rows_seconds,
    saturated_gain,
)
from benchmarks.routing import CHOOSERS, Pace, together
from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.machine import machine_of
from shoal.policy.routing.balanced import FACTORS
from shoal.policy.routing.route import Hop
from shoal.simulator.world.places import Place
from shoal.spans import Span

from .test_routing import server


def test_a_pass_charges_each_block_the_rows_of_the_sessions_that_use_it():
    here = server("s", "0:8", 10.0)  # a block takes 12.5 ms for one session
    one, long, short = 1 / 80, Hop(here, Span(0, 8)), Hop(here, Span(6, 8))
    assert pass_seconds([long]) == pytest.approx(0.1)
    assert pass_seconds([long, short]) == pytest.approx(one * (6 + 2 * rows_seconds(2)))
    assert pass_seconds([short, Hop(here, Span(0, 2))]) == pytest.approx(4 * one)
    assert pass_seconds([long] * SATURATED_ROWS) == pytest.approx(0.1 * SATURATED_ROWS / saturated_gain())


def test_one_client_decodes_at_the_speed_of_its_route():
    swarm = Simulated.of(6, 4, seed=1)
    place = Place.anywhere(random.Random(2))
    hops, block = list[Hop](), 0
    while block < 4:
        holder = next(each for each in swarm.view.servers if block in each.span)
        hops.append(Hop(holder, Span(block, holder.span.end)))
        block = holder.span.end
    speed, steps, _ = Traffic(swarm, [(place, tuple(hops))]).run(60.0)
    assert steps == pytest.approx([swarm.step_seconds(hops, place)] * len(steps))
    assert speed == pytest.approx(1 / swarm.step_seconds(hops, place), rel=0.05)


def test_servers_announce_what_their_machines_can_do_and_hold_all_blocks():
    swarm = Simulated.of(12, 8, seed=3, rule="graded")
    assert not swarm.view.missing()
    for each, machine in zip(swarm.view.servers, swarm.machines, strict=True):
        found = machine_of(each, now=0.0)
        assert found is not None
        assert found.block_speed(len(each.span)) == pytest.approx(machine.block_speed(len(each.span)))
    assert throughput_bound(swarm.machines, 8) > 0


def test_balanced_routes_get_more_of_a_swarm_that_clients_saturate_and_are_hardly_longer():
    swarm = Simulated.of(24, 16, seed=0, rule="graded")
    chance = random.Random(1)
    clients = [Place.anywhere(chance) for _ in range(1200)]
    pace = Pace(waves=3, renewals=3, wave_seconds=1.5, seconds=3.0)
    balanced, shortest = (together(swarm, CHOOSERS[name], clients, pace) for name in ("balanced", "shortest"))
    assert balanced.speed >= 1.2 * shortest.speed
    assert balanced.most_factor <= FACTORS[1] + 1e-9
