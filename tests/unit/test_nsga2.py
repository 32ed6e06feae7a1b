"""The evolutionary chooser: its parts do what Deb et al. say, and its routes are routes."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.routing.nsga2 import crowding, dominates, fronts
from shoal.policy.routing.route import Measured, Needs, choose_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .test_routing import STEP, knowledge, server, swarms

points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


def test_one_dominates_another_that_is_nowhere_better():
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 3), (1, 2))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))


def test_fronts_are_peeled_off_one_after_another():
    found = fronts([(1, 4), (2, 2), (4, 1), (3, 3), (5, 5), (2, 5)])
    assert [sorted(front) for front in found] == [[0, 1, 2], [3, 5], [4]]


@given(points)
def test_each_point_of_a_front_is_dominated_from_the_front_before_only(scores: list[tuple[int, int]]):
    found = fronts(scores)
    assert sorted(index for front in found for index in front) == list(range(len(scores)))
    for previous, front in zip([[], *found], found, strict=False):
        for index in front:
            assert not any(dominates(scores[other], scores[index]) for other in front)
            assert not previous or any(dominates(scores[other], scores[index]) for other in previous)


def test_the_ends_of_a_front_are_kept_and_then_those_with_few_neighbours():
    assert crowding([(0, 10), (1, 9), (2, 8), (9, 1), (10, 0)]) == [float("inf"), 0.4, 1.6, 1.6, float("inf")]
    assert crowding([(1, 1), (1, 1), (1, 1)]) == [float("inf"), 0.0, float("inf")]


@settings(max_examples=15)
@given(swarms(), knowledge(), st.sampled_from((STEP, Needs(session=False), Needs(head=True))), st.integers(0, 99))
def test_a_route_covers_every_block_by_a_server_that_may_compute_it(
    view: SwarmView, known: Measured, needs: Needs, seed: int
):
    span = Span(0, view.num_blocks)
    found = choose_route(view, span, needs=needs, known=known, chooser="nsga2", rng=random.Random(seed))
    best = choose_route(view, span, needs=needs, known=known)
    assert [block for hop in found.hops for block in hop.span] == list(span)
    assert all(hop.server in view.holders(hop.span)[0] for hop in found.hops)
    assert not needs.head or found.hops[-1].server.head
    assert found.seconds >= best.seconds - 1e-9


def test_the_same_seed_finds_the_same_route():
    chance = random.Random(5)
    spans = ("0:2", "2:4", "4:6") * 4
    view = SwarmView(6, tuple(server(f"s{i}", span, chance.uniform(1, 50)) for i, span in enumerate(spans)))
    one, again = (
        choose_route(view, Span(0, 6), needs=STEP, known=Measured(), chooser="nsga2", rng=random.Random(7))
        for _ in range(2)
    )
    assert one == again


def test_a_route_that_is_best_in_everything_is_found():
    slow = tuple(server(f"slow{index}", "0:4", 1) for index in range(6))
    view = SwarmView(4, (*slow, server("fast", "0:4", 100)))
    found = choose_route(view, Span(0, 4), needs=STEP, known=Measured(), chooser="nsga2", rng=random.Random(0))
    assert [hop.server.peer for hop in found.hops] == ["fast"]


def test_an_even_route_is_preferred_to_one_that_is_hardly_quicker_and_has_a_queue():
    queued = replace(server("queued", "0:4", 10), queue_length=1)
    halves = (server("a", "0:2", 10), server("b", "2:4", 10))
    view, known = SwarmView(4, (queued, *halves)), Measured({"queued": 0.001, "a": 0.04, "b": 0.04})
    quickest = choose_route(view, Span(0, 4), needs=STEP, known=known)
    even = choose_route(view, Span(0, 4), needs=STEP, known=known, chooser="nsga2", rng=random.Random(0))
    assert [hop.server.peer for hop in quickest.hops] == ["queued"]
    assert [hop.server.peer for hop in even.hops] == ["a", "b"]
