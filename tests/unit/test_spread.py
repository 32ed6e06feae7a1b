"""Microbatches over parallel servers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.routing.route import Measured, Needs, choose_route
from shoal.policy.routing.spread import SMALLEST_PASS, WorkInFlight, microbatch_rows
from shoal.policy.view import SwarmView
from shoal.protocol import MAX_STEP_TOKENS
from shoal.spans import Span

from .test_routing import server

PASS = Needs(step_tokens=1024, session=False)


def spread(view: SwarmView, number: int, known: Measured | None = None) -> Counter[str]:
    """How many of `number` passes each server gets, if all are sent at once."""
    in_flight, found = WorkInFlight(), Counter[str]()
    for _ in range(number):
        known = Measured((known or Measured()).round_trips, work_in_flight=in_flight.seconds)
        route = choose_route(view, Span(0, view.num_blocks), needs=PASS, known=known)
        in_flight = in_flight.added(route)
        found.update(hop.server.peer for hop in route.hops)
    return found


def test_two_equal_servers_get_half_of_the_passes_each():
    assert spread(SwarmView(4, (server("a", "0:4"), server("b", "0:4"))), 8) == {"a": 4, "b": 4}


def test_servers_get_passes_in_proportion_to_their_speed():
    found = spread(SwarmView(4, (server("a", "0:4", 30), server("b", "0:4", 10))), 40)
    assert found["a"] in (29, 30, 31)


def test_every_stage_is_spread_by_itself():
    stages = ("a", "0:2", 10.0), ("b", "0:2", 10.0), ("c", "2:4", 20.0), ("d", "2:4", 20.0), ("e", "2:4", 20.0)
    found = spread(SwarmView(4, tuple(server(*stage) for stage in stages)), 12)
    assert found == {"a": 6, "b": 6, "c": 4, "d": 4, "e": 4}


def test_a_far_server_gets_less_and_still_some():
    view = SwarmView(4, (server("near", "0:4", 1000), server("far", "0:4", 1000)))
    found = spread(view, 20, Measured({"near": 0.001, "far": 5.0}))
    assert 0 < found["far"] < found["near"]


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=4), st.integers(1, 12))
def test_when_all_passes_are_done_no_work_is_in_flight(speeds: list[float], number: int):
    view = SwarmView(4, tuple(server(f"s{index}", "0:4", speed) for index, speed in enumerate(speeds)))
    in_flight, routes = WorkInFlight(), []
    for _ in range(number):
        routes.append(choose_route(view, Span(0, 4), needs=PASS, known=Measured(work_in_flight=in_flight.seconds)))
        in_flight = in_flight.added(routes[-1])
    assert sum(in_flight.seconds.values()) == pytest.approx(sum(cost.compute for r in routes for cost in r.costs))
    for route in reversed(routes):
        in_flight = in_flight.removed(route)
    assert in_flight == WorkInFlight()


@given(batch_size=st.integers(1, 4096), num_tokens=st.integers(1, 5000), num_servers=st.integers(0, 100))
def test_microbatches_fit_into_a_message_and_are_enough_for_all_servers(
    batch_size: int, num_tokens: int, num_servers: int
):
    rows = microbatch_rows(batch_size, num_tokens, num_servers=num_servers)
    assert rows >= 1
    assert rows * num_tokens <= MAX_STEP_TOKENS or rows == 1
    too_small = rows * num_tokens <= SMALLEST_PASS + num_tokens
    assert too_small or batch_size // rows >= num_servers


@pytest.mark.parametrize(
    ("batch_size", "num_servers", "rows"), [(64, 1, 8), (64, 8, 4), (64, 100, 2), (1, 4, 2), (4, 1, 2)]
)
def test_a_batch_of_sequences_of_128_tokens_is_cut_by_the_number_of_servers(
    batch_size: int, num_servers: int, rows: int
):
    assert microbatch_rows(batch_size, 128, num_servers=num_servers) == rows
