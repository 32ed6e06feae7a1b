"""Servers that want blocks at the same moment: who takes which, and which may go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.peers import Capacity, ServerInfo, ServerState
from shoal.policy.claims import last_online, machines_in, settled, uncovered, yields_to
from shoal.policy.placement.joining import Placed, choose_blocks
from shoal.policy.placement.machines import Machine
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
    own = claim("z", "6:12", most=6)
    mover = replace(able("a", "6:12", most=6, state=JOINING), decode_speed=10.0)
    others = SwarmView(NUM_BLOCKS, (able("b", "0:6", most=6), mover))
    assert settled(own, others, choose=choose, now=0.0).span == Span(6, 12)


def test_blocks_are_uncovered_unless_another_server_that_stays_is_online_there():
    others = SwarmView(
        NUM_BLOCKS,
        (server("a", "0:4"), server("b", "4:8", state=JOINING), server("c", "2:6"), server("d", "6:8", state=LEAVING)),
    )
    assert uncovered(Span(0, 8), others) == [6, 7]
    assert uncovered(Span(1, 5), others) == []


def test_of_two_servers_that_want_to_fill_a_hole_one_yields_to_the_other():
    a, b = (replace(able(peer, "6:12", most=6, state=JOINING), decode_speed=10.0) for peer in "ab")
    for own, other in ((a, b), (b, a)):
        found = yields_to(own.peer, range(6, 12), SwarmView(NUM_BLOCKS, (other,)))
        assert found == (None if own is a else a)


def test_a_server_yields_to_whatever_will_fill_the_hole_for_sure():
    fills = range(6, 12)
    loading = replace(able("z", "6:12", most=6, state=JOINING), decode_speed=10.0, ready_at=5.0)
    for other in (loading, claim("z", "5:12", most=7), able("z", "0:12", most=12)):
        assert yields_to("a", fills, SwarmView(NUM_BLOCKS, (other,))) == other
    for other in (able("z", "6:11", most=6), able("0", "6:12", most=6, state=LEAVING)):
        assert yields_to("a", fills, SwarmView(NUM_BLOCKS, (other,))) is None
    assert yields_to("b", (), SwarmView(NUM_BLOCKS, (able("a", "0:12", most=12),))) is None


def test_a_server_that_claims_other_blocks_counts_where_it_serves_and_where_it_wants_to_go():
    serving = able("a", "0:6", most=6)
    wants = replace(serving, span=Span(6, 12), state=JOINING)
    served = last_online({}, SwarmView(NUM_BLOCKS, (serving,)))
    served = last_online(served, SwarmView(NUM_BLOCKS, (wants,)))
    found = machines_in(SwarmView(NUM_BLOCKS, (wants,)), now=10.0, served=served)
    assert Counter((each.peer, each.span, each.movable) for each in found) == Counter(
        [("a", Span(0, 6), True), ("a", Span(6, 12), False)]
    )
    confirmed = SwarmView(NUM_BLOCKS, (replace(wants, ready_at=20.0),))
    served = last_online(served, confirmed)
    assert [each.span for each in machines_in(confirmed, now=10.0, served=served)] == [Span(6, 12)]
