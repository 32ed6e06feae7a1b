"""How fast a server is believed to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.swarm.measurements import Measurements
from shoal.peers import Capacity, ServerInfo
from shoal.policy.routing.balanced import saturated_speeds
from shoal.policy.routing.belief import BELIEVED, LEAST_SECONDS, MOST_GAIN, Ceiling, Fastest, ceiling
from shoal.policy.routing.costs import Costs, Measured, Needs
from shoal.policy.routing.route import choose_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .test_routing import server

ALL = Span(0, 8)
HONEST = server("honest", "0:8", 2.0)
LIAR = server("liar", "0:8", 1e9)
FAR = {"honest": 0.01, "liar": 0.3}


def taken(view: SwarmView, most: Ceiling, *, known: Measured | None = None, needs: Needs | None = None) -> str:
    """The server of the best route."""
    known = replace(known or Measured(FAR), ceiling=most)
    (hop,) = choose_route(view, ALL, needs=needs or Needs(), known=known).hops
    return hop.server.peer


def test_a_claim_that_nothing_confirms_wins_no_route_over_a_far_link():
    view = SwarmView(8, (HONEST, LIAR))
    assert taken(view, Ceiling()) == "liar"  # if all is believed
    assert taken(view, ceiling(Fastest(), view.servers)) == "honest"


def test_once_steps_have_shown_how_fast_servers_are_the_claims_of_all_together_count_no_more():
    view = SwarmView(8, (HONEST, *(server(f"liar{index}", "0:8", 1e9) for index in range(9))))
    known = Measured({each.peer: 0.3 for each in view.servers} | {"honest": 0.01})
    assert taken(view, ceiling(Fastest(), view.servers), known=known) != "honest"
    shown = Fastest().after(num_blocks=8, num_tokens=1, seconds=0.5)
    assert taken(view, ceiling(shown, view.servers), known=known) == "honest"


def test_a_server_that_is_faster_than_all_before_is_taken_and_believed_once_it_has_shown_it():
    fast = server("fast", "0:8", 100.0)
    view, known = SwarmView(8, (HONEST, fast)), Measured({"honest": 0.01, "fast": 0.01})
    shown = Fastest().after(8, 1, 0.5)
    assert taken(view, ceiling(shown, view.servers), known=known) == "fast"
    most = ceiling(shown.after(8, 1, 0.01), view.servers)
    assert Costs(Needs(), replace(known, ceiling=most)).block(fast) == pytest.approx(1 / 800)


@pytest.mark.parametrize(("num_liars", "counts"), [(0, 80.0), (2, 80.0), (3, 8e9)])
def test_before_the_first_step_the_speed_counts_that_a_quarter_of_those_who_answered_reach(
    num_liars: int, counts: float
):
    honest = [server(f"s{index}", "0:8", 10.0 if index > 3 else 1.0) for index in range(8)]
    liars = [server(f"liar{index}", "0:8", 1e9) for index in range(num_liars)]
    assert ceiling(Fastest(), (*honest, *liars)).decode == BELIEVED * counts


def test_where_nothing_is_known_all_is_believed():
    assert ceiling(Fastest(), (replace(HONEST, decode_speed=None, prefill_speed=None),)) == Ceiling()


def test_a_server_that_answers_at_once_raises_the_ceiling_to_a_limit():
    assert Fastest().after(8, 1, 0.0).decode == 8 / LEAST_SECONDS


def test_a_short_step_says_nothing_of_how_fast_prompts_are_read():
    assert Fastest().after(8, 4, 0.5) == Fastest(16.0, None)
    assert Fastest().after(8, 100, 0.5) == Fastest(16.0, 1600.0)


@given(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 8192), st.floats(0.0, 1e3)), max_size=20))
def test_the_best_speed_that_was_shown_never_falls(steps: list[tuple[int, int, float]]):
    shown = Fastest()
    for step in steps:
        before, shown = shown, shown.after(*step)
        assert (shown.decode or 0.0) >= (before.decode or 0.0)
        assert (shown.prefill or 0.0) >= (before.prefill or 0.0)


def test_prompts_are_believed_to_be_read_as_fast_as_any_were():
    shown = Fastest(decode=16.0, prefill=1000.0)
    costs = Costs(Needs(step_tokens=100), Measured(ceiling=ceiling(shown, ())))
    assert costs.block(LIAR) == pytest.approx(100 / 2000)
    assert costs.block(server("slow", "0:8", 1.0)) == pytest.approx(100 / 8)


def full_of(info: ServerInfo, block_speed: float) -> ServerInfo:
    capacity = Capacity(8, ((8, block_speed),), network_speed=None, load_seconds=1.0, disk_seconds=1.0)
    return replace(info, capacity=capacity)


def test_what_a_server_announces_for_many_sessions_is_believed_as_far_as_what_it_announces_for_one():
    costs = Costs(Needs(), Measured(ceiling=Ceiling(decode=32.0, prefill=1e3)))
    servers = (full_of(HONEST, 400.0), full_of(LIAR, 8e10), full_of(replace(HONEST, peer="bold"), 1e12))
    assert list(saturated_speeds(servers, costs)) == pytest.approx([400.0, 32.0 * 10, 16.0 * MOST_GAIN])


def test_a_liars_queue_does_not_look_short_because_of_its_speed():
    costs = Costs(Needs(session=False), Measured(ceiling=Ceiling(decode=32.0, prefill=1e3)))
    assert costs.queue(replace(LIAR, queue_length=4)) == pytest.approx(4 * 8 / 32)


def test_a_client_believes_what_it_was_told_until_it_has_seen_steps():
    found = Measurements(lambda: 0.0)
    assert found.measured().ceiling == Ceiling()
    found.believe((HONEST, LIAR))
    assert found.measured().ceiling.decode == BELIEVED * 16.0
    found.record_speed(8, 1, 0.1)
    found.believe((HONEST, LIAR))
    assert found.measured().ceiling.decode == BELIEVED * 80.0
