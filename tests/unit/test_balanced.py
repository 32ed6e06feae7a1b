"""Routes that share the load: hardly slower than the fastest, and spread over the servers as these can bear it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.peers import Capacity, ServerInfo
from shoal.policy.routing.balanced import BUSY_REQUESTS, FACTORS, QUEUES, factor, saturated_speeds, shares
from shoal.policy.routing.costs import Costs
from shoal.policy.routing.lattice import lattice_of
from shoal.policy.routing.route import Measured, Needs, Route, choose_route, price_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .test_routing import PASS, STEP, knowledge, server, swarms

NOTHING = Measured()


def busy(view: SwarmView, *, queue_length: int = 3) -> SwarmView:
    return replace(view, servers=tuple(replace(each, queue_length=queue_length) for each in view.servers))


def routes(
    view: SwarmView, number: int, *, needs: Needs = STEP, known: Measured = NOTHING, span: Span | None = None
) -> list[Route]:
    """What as many clients choose from the same view."""
    span = span or Span(0, view.num_blocks)
    return [
        choose_route(view, span, needs=needs, known=known, chooser="balanced", rng=random.Random(seed))
        for seed in range(number)
    ]


def work(found: Sequence[Route]) -> Counter[str]:
    """How many blocks each server computes, per route."""
    blocks = Counter[str]()
    for route in found:
        for hop in route.hops:
            blocks[hop.server.peer] += len(hop.span)
    return Counter({peer: number / len(found) for peer, number in blocks.items()})


@given(swarms(), knowledge(), st.sampled_from((STEP, Needs(head=True))), st.integers(0, 99))
def test_no_route_is_expected_to_take_longer_than_the_factor_allows(
    view: SwarmView, known: Measured, needs: Needs, seed: int
):
    span = Span(0, view.num_blocks)
    best = choose_route(view, span, needs=needs, known=known)
    found = choose_route(view, span, needs=needs, known=known, chooser="balanced", rng=random.Random(seed))
    assert [block for hop in found.hops for block in hop.span] == list(span)
    assert all(hop.server in view.holders(hop.span)[0] for hop in found.hops)
    assert not needs.head or found.hops[-1].server.head
    assert best.seconds - 1e-9 <= found.seconds <= factor(view.servers, Costs(needs, known)) * best.seconds + 1e-9


def test_the_longer_the_queues_are_the_longer_a_route_may_be():
    view = SwarmView(4, tuple(server(f"s{index}", "0:4", 10) for index in range(3)))
    found = [factor(busy(view, queue_length=length).servers, Costs(STEP, NOTHING)) for length in (0, 8, 16, 32, 999)]
    assert QUEUES == (8, 32)
    least, most = FACTORS
    assert found == pytest.approx([least, least, (least + most) / 2, most, most])
    one_is_full = (replace(view.servers[0], queue_length=48), *view.servers[1:])
    assert factor(one_is_full, Costs(STEP, NOTHING)) == pytest.approx((least + most) / 2)


@given(swarms(), knowledge(), st.integers(0, 99))
def test_while_the_servers_are_idle_it_is_the_fastest_route(view: SwarmView, known: Measured, seed: int):
    idle = busy(view, queue_length=int(BUSY_REQUESTS))
    known = replace(known, work_in_flight={})
    span = Span(0, view.num_blocks)
    best = choose_route(idle, span, needs=STEP, known=known)
    assert choose_route(idle, span, needs=STEP, known=known, chooser="balanced", rng=random.Random(seed)) == best


@given(swarms(), knowledge())
def test_single_passes_take_the_fastest_route(view: SwarmView, known: Measured):
    span = Span(0, view.num_blocks)
    best = choose_route(busy(view), span, needs=PASS, known=known)
    assert choose_route(busy(view), span, needs=PASS, known=known, chooser="balanced", rng=random.Random(0)) == best


@settings(max_examples=20)
@given(swarms(), knowledge(), st.integers(0, 99))
def test_the_same_seed_finds_the_same_route(view: SwarmView, known: Measured, seed: int):
    one, again = (
        choose_route(
            busy(view), Span(0, view.num_blocks), needs=STEP, known=known, chooser="balanced", rng=random.Random(seed)
        )
        for _ in range(2)
    )
    assert one == again


def test_one_busy_server_on_the_fastest_route_is_enough_to_spread():
    idle = [server(f"far{index}", "0:4", 10) for index in range(40)]
    view = SwarmView(4, (*idle, replace(server("near", "0:4", 10), queue_length=2)))
    known = Measured({"near": 0.001} | {each.peer: 0.3 for each in idle})
    found = routes(view, 50, known=known)
    assert len({route.hops[0].server.peer for route in found}) > 10


def test_equal_servers_get_equal_work_although_all_clients_see_the_same():
    view = busy(SwarmView(4, tuple(server(f"s{index}", "0:4", 10) for index in range(4))))
    found = work(routes(view, 400))
    assert len(found) == 4
    assert all(found[peer] == pytest.approx(1.0, abs=0.3) for peer in found)


def test_servers_get_work_in_proportion_to_their_speed():
    view = busy(SwarmView(4, (server("fast", "0:4", 30), server("slow", "0:4", 10))), queue_length=0)
    view = replace(view, servers=tuple(replace(each, queue_length=9) for each in view.servers))
    known = Measured({"fast": 0.5, "slow": 0.001})
    found = work(routes(view, 400, known=known))
    assert found["fast"] == pytest.approx(3.0, abs=0.3)


def test_a_queue_that_is_long_at_one_moment_moves_no_load_within_the_budget():
    one, other = (replace(server(peer, "0:4", 100), queue_length=3) for peer in ("one", "other"))
    known = Measured({"one": 1.0, "other": 1.0})
    uneven = work(routes(SwarmView(4, (replace(one, queue_length=11), other)), 300, known=known))
    assert uneven["one"] == pytest.approx(2.0, abs=0.3)
    too_long = work(routes(SwarmView(4, (replace(one, queue_length=999), other)), 300, known=known))
    assert too_long["one"] == 0


def test_a_route_stays_on_its_servers_to_the_end_of_their_spans_where_that_shares_the_load():
    view = busy(SwarmView(8, tuple(server(f"{span} {index}", span, 10) for span in ("0:4", "4:8") for index in "abc")))
    assert all(len(route.hops) == 2 for route in routes(view, 100))


def test_announced_capacities_count_more_than_the_speed_of_single_tokens():
    def with_capacity(each: ServerInfo, speed: float) -> ServerInfo:
        return replace(each, capacity=Capacity(4, ((1, speed),), None, 1.0, 1.0))

    costs = Costs(STEP, NOTHING)
    gpu, cpu = with_capacity(server("gpu", "0:4", 10), 4000.0), with_capacity(server("cpu", "0:4", 10), 80.0)
    assert saturated_speeds([gpu, cpu], costs).tolist() == pytest.approx([4000.0, 80.0])
    limited = replace(gpu, capacity=Capacity(4, ((1, 4000.0),), 20.0, 1.0, 1.0))
    assert saturated_speeds([limited, cpu], costs).tolist() == pytest.approx([80.0, 80.0])
    unknown = replace(cpu, capacity=None)
    assert saturated_speeds([gpu, unknown], costs).tolist() == pytest.approx([40.0, 40.0])
    slow = Costs(STEP, Measured(slowness={"gpu": 4.0}))
    assert saturated_speeds([gpu, cpu], slow).tolist() == pytest.approx([1000.0, 80.0])


@st.composite
def placements(draw: st.DrawFn) -> SwarmView:
    num_blocks = draw(st.integers(1, 8))
    servers = [server("whole", f"0:{num_blocks}", draw(st.floats(1, 100)))]
    for index in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, num_blocks - 1))
        span = f"{start}:{draw(st.integers(start + 1, num_blocks))}"
        servers.append(server(f"s{index}", span, draw(st.floats(1, 100))))
    return SwarmView(num_blocks, tuple(servers))


@given(placements())
def test_the_shares_of_a_block_are_of_its_holders_and_add_up(view: SwarmView):
    costs = Costs(STEP, NOTHING)
    ways = lattice_of(view, Span(0, view.num_blocks), costs, upstream=None, downstream=None)
    found = shares(ways, saturated_speeds(ways.servers, costs))
    assert np.allclose(found.sum(axis=1), 1.0)
    for block, row in enumerate(found):
        assert all(block in ways.servers[index].span for index in row.nonzero()[0])


def test_the_shares_relieve_the_servers_of_weak_blocks():
    """The only holder of the blocks 4:8 is left alone with the other blocks that it holds."""
    only, others = server("only", "2:8", 10), [server(f"s{index}", "0:4", 10) for index in range(3)]
    view = SwarmView(8, (only, *others))
    costs = Costs(STEP, NOTHING)
    ways = lattice_of(view, Span(0, 8), costs, upstream=None, downstream=None)
    found = shares(ways, saturated_speeds(ways.servers, costs))
    index = [each.peer for each in ways.servers].index("only")
    assert found[4:, index].tolist() == [1.0] * 4
    assert found[2:4, index].max() < 0.05


def test_no_route_goes_through_a_server_without_room_where_another_has_room():
    view = busy(SwarmView(6, tuple(server(f"{span} {index}", span, 10) for span in ("0:3", "3:6") for index in "abcd")))
    full = replace(
        view, servers=tuple(replace(each, cache_tokens_left=100 * (" a" in each.peer)) for each in view.servers)
    )
    needs = Needs(needed_tokens=50)
    assert {hop.server.peer for route in routes(full, 50, needs=needs) for hop in route.hops} == {"0:3 a", "3:6 a"}
    none = replace(full, servers=tuple(replace(each, cache_tokens_left=0) for each in view.servers))
    assert len(work(routes(none, 50, needs=needs))) > 4


def test_a_part_of_a_ring_is_shared_too():
    view = busy(SwarmView(8, tuple(server(f"s{index}", "2:6", 10) for index in range(4))))
    upstream, downstream = server("up", "0:3"), server("down", "5:8")
    found = [
        choose_route(
            view,
            Span(3, 5),
            needs=STEP,
            known=NOTHING,
            upstream=upstream,
            downstream=downstream,
            chooser="balanced",
            rng=random.Random(seed),
        )
        for seed in range(40)
    ]
    assert len({route.hops[0].server.peer for route in found}) == 4
    again = price_route(found[0].hops, needs=STEP, known=NOTHING, upstream=upstream, downstream=downstream)
    assert again.seconds == pytest.approx(found[0].seconds)


@pytest.mark.parametrize("chooser", ["balanced", "nsga2"])
def test_a_random_chooser_needs_a_source_of_randomness(chooser: str):
    view = SwarmView(4, (server("s", "0:4"),))
    with pytest.raises(ValueError, match=f"{chooser!r} needs a source of randomness"):
        choose_route(view, Span(0, 4), needs=STEP, known=NOTHING, chooser=chooser)  # type: ignore[arg-type]
