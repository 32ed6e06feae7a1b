"""Servers that want blocks at the same moment: who takes which, and which may go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.peers import Capacity, ServerInfo, ServerState
from shoal.policy.claims import machines_in, settled, uncovered, yields_to
from shoal.policy.machines.machine import Machine
from shoal.policy.placement.joining import Placed, choose_blocks
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .test_routing import server

NUM_BLOCKS = 12
JOINING, ONLINE, LEAVING = ServerState.JOINING, ServerState.ONLINE, ServerState.LEAVING


def able(peer: str, span: str, *, most: int, speed: float = 100.0, state: ServerState = ONLINE) -> ServerInfo:
    capacity = Capacity(most, ((most, speed),), None, 1.0, 1.0)
    return replace(server(peer, span, state=state), capacity=capacity)


def claim(peer: str, span: str, *, most: int, speed: float = 100.0) -> ServerInfo:
    """A server that joins, and has not confirmed its claim."""
    return replace(able(peer, span, most=most, speed=speed, state=JOINING), decode_speed=None, ready_at=None)


def choose(machine: Machine, others: Sequence[Machine]) -> Placed:
    return choose_blocks(machine, others, NUM_BLOCKS, rng=random.Random(machine.peer))


joiners = st.lists(st.integers(1, NUM_BLOCKS), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(joiners, st.integers(0, 1000))
def test_servers_that_claim_at_once_and_see_each_other_agree_after_one_look(lengths: list[int], seed: int):
    """Whatever each claimed first: what one would do is what the others expect of it, and it does not change again."""
    rng = random.Random(seed)
    peers = rng.sample([f"p{index}" for index in range(100)], len(lengths))
    claims = [claim(peer, "0:1", most=most) for peer, most in zip(peers, lengths, strict=True)]
    for _ in range(2):
        view = SwarmView(NUM_BLOCKS, tuple(claims))
        spans = [settled(own, view, choose=choose, now=0.0).span for own in claims]
        claims = [replace(own, span=span) for own, span in zip(claims, spans, strict=True)]
    view = SwarmView(NUM_BLOCKS, tuple(claims))
    assert [settled(own, view, choose=choose, now=0.0).span for own in claims] == [each.span for each in claims]
    in_turn: list[Machine] = []
    for own in sorted(claims, key=lambda each: each.peer):
        (machine,) = machines_in(SwarmView(NUM_BLOCKS, (own,)), now=0.0)
        assert choose(replace(machine, span=None), in_turn).span == own.span
        in_turn.append(machine)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.integers(3, 6))
def test_four_equal_servers_that_start_together_leave_no_hole(order: list[int], most: int):
    claims = [claim(f"p{index}", "0:3", most=most) for index in order]
    view = SwarmView(NUM_BLOCKS, tuple(claims))
    spans = [settled(own, view, choose=choose, now=0.0).span for own in claims]
    assert {block for span in spans for block in span} == set(range(NUM_BLOCKS))


def test_a_claim_that_was_confirmed_is_not_reconsidered():
    """Although its server comes later in the order of the peer ids."""
    confirmed = replace(claim("z", "0:6", most=6), ready_at=30.0)
    own = claim("a", "0:6", most=6)
    assert settled(own, SwarmView(NUM_BLOCKS, (own, confirmed)), choose=choose, now=0.0).span == Span(6, 12)


def test_a_server_that_only_wants_to_move_gives_way_to_one_that_joins():
    moving = replace(able("a", "0:6", most=6), wants=Span(6, 12))
    own = claim("b", "6:12", most=6)
    view = SwarmView(NUM_BLOCKS, (moving, able("c", "0:6", most=6)))
    assert settled(own, view, choose=choose, now=0.0).span == Span(6, 12)


def test_blocks_are_uncovered_unless_another_server_that_stays_is_online_there():
    others = SwarmView(
        NUM_BLOCKS,
        (server("a", "0:4"), server("b", "4:8", state=JOINING), server("c", "2:6"), server("d", "6:8", state=LEAVING)),
    )
    machines = machines_in(others, now=0.0)
    assert uncovered(Span(0, 8), None, machines) == [6, 7]
    assert uncovered(Span(1, 5), None, machines) == []
    assert uncovered(Span(0, 8), Span(7, 8), machines) == [6]


def test_a_server_that_loads_covers_nothing_even_if_it_says_that_it_was_ready_long_ago():
    loading = replace(server("a", "0:4", state=JOINING), ready_at=0.0)
    wanting = replace(able("b", "4:8", most=4), wants=Span(0, 4), ready_at=0.0)
    machines = machines_in(SwarmView(NUM_BLOCKS, (loading, wanting)), now=100.0)
    assert uncovered(Span(0, 8), None, machines) == [*range(8)]


def test_of_a_server_that_wants_other_blocks_only_those_cover_that_it_keeps():
    roomy, full = (replace(able(peer, "0:4", most=most), wants=Span(2, 6)) for peer, most in (("a", 6), ("b", 5)))
    for ready_at in (None, 5.0):
        for wanting, left in ((roomy, [0, 1]), (full, [0, 1, 2, 3])):
            others = SwarmView(NUM_BLOCKS, (replace(wanting, ready_at=ready_at),))
            assert uncovered(Span(0, 4), None, machines_in(others, now=0.0)) == left


def test_of_two_servers_that_want_to_fill_a_hole_one_yields_to_the_other():
    a, b = (replace(able(peer, "0:6", most=6), wants=Span(6, 12)) for peer in "ab")
    for own, other in ((a, b), (b, a)):
        found = yields_to(own.peer, range(6, 12), SwarmView(NUM_BLOCKS, (other,)))
        assert found == (None if own is a else a)


def test_a_server_yields_to_whatever_will_fill_the_hole_for_sure():
    fills = range(6, 12)
    loading = replace(able("z", "6:12", most=6, state=JOINING), decode_speed=10.0, ready_at=5.0)
    extending = replace(able("z", "0:7", most=12), wants=Span(0, 12), ready_at=5.0)
    for other in (loading, extending, claim("z", "5:12", most=7), able("z", "0:12", most=12)):
        assert yields_to("a", fills, SwarmView(NUM_BLOCKS, (other,))) == other
    for other in (able("z", "6:11", most=6), able("0", "6:12", most=6, state=LEAVING)):
        assert yields_to("a", fills, SwarmView(NUM_BLOCKS, (other,))) is None
    assert yields_to("b", (), SwarmView(NUM_BLOCKS, (able("a", "0:12", most=12),))) is None


def test_a_server_that_claims_other_blocks_counts_where_it_serves_and_where_it_wants_to_go():
    wants = replace(able("a", "0:6", most=6), wants=Span(6, 12))
    found = machines_in(SwarmView(NUM_BLOCKS, (wants,)), now=10.0)
    assert Counter((each.span, each.serves, each.movable) for each in found) == Counter(
        [(Span(0, 6), Span(0, 6), True), (Span(6, 12), None, False)]
    )


def test_a_server_that_loads_beside_what_it_serves_counts_where_it_goes_and_serves_what_it_keeps():
    wants = replace(able("a", "0:6", most=9), wants=Span(3, 9), ready_at=20.0)
    (found,) = machines_in(SwarmView(NUM_BLOCKS, (wants,)), now=10.0)
    assert (found.span, found.serves, found.ready_at, found.movable) == (Span(3, 9), Span(3, 6), 20.0, False)


def test_in_a_crowd_the_averages_of_all_servers_count_and_not_the_few_that_were_read():
    crowd = [
        Machine(f"servers of {span}", span, 6, ((6, 100.0),), count=count)
        for span, count in ((Span(0, 6), 90), (Span(6, 12), 30))
    ]
    read = SwarmView(NUM_BLOCKS, (able("a", "0:6", most=6), *(able(peer, "6:12", most=6) for peer in "cde")))
    own = claim("b", "0:6", most=6)
    assert settled(own, read, choose=choose, now=0.0).span == Span(0, 6)
    assert settled(own, read, choose=choose, now=0.0, crowd=crowd).span == Span(6, 12)
