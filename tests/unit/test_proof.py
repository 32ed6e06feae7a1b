"""Which servers are pinged before a route is chosen."""

from __future__ import annotations

import pytest

from shoal.policy.routing.costs import Costs, Measured, Needs
from shoal.policy.routing.proof import RANDOM_FRACTION, servers_to_probe, sole_holders
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .test_routing import server

ALL = Span(0, 8)


def asked(view: SwarmView, *, known: frozenset[str] = frozenset(), most: int = 8, head: bool = False) -> list[str]:
    chosen = servers_to_probe(view, ALL, Costs(Needs(head=head), Measured()), known=known, most=most)
    return [each.peer for each in chosen]


def test_a_server_that_holds_a_block_alone_is_not_pinged():
    view = SwarmView(8, (server("a", "0:6"), server("b", "4:8"), server("c", "4:6")))
    assert sole_holders(view, ALL) == {"a", "b"}
    assert sole_holders(view, Span(4, 6)) == frozenset()
    assert asked(view, known=sole_holders(view, ALL)) == ["c"]


def test_a_server_whose_only_rival_is_out_of_view_is_pinged():
    everyone = SwarmView(8, (server("lost", "0:8"), server("new", "0:8")))
    view = everyone.only(lambda each: each.peer != "lost")
    assert asked(view, known=sole_holders(everyone, ALL)) == ["new"]


def test_the_best_of_each_block_are_pinged_first_and_some_at_random():
    slow = [server(f"slow{index}", "0:4", 1.0) for index in range(30)]
    fast = [server(f"fast{index}", "0:4", 100.0) for index in range(30)]
    tail = [server(f"tail{index}", "4:8", 0.1) for index in range(30)]
    chosen = asked(SwarmView(8, (*slow, *fast, *tail)), most=32)
    assert len(set(chosen)) == 32
    best = chosen[: 32 - 32 // RANDOM_FRACTION]
    assert sum(peer.startswith("fast") for peer in best) == sum(peer.startswith("tail") for peer in best) == 12
    assert chosen[len(best) :] == [f"slow{index}" for index in range(32 // RANDOM_FRACTION)]


@pytest.mark.parametrize("most", [8, 32, 1000])
def test_servers_that_are_known_are_not_pinged_and_all_others_in_the_end(most: int):
    servers = tuple(server(f"s{index}", "0:8", float(index)) for index in range(300))
    view, known, rounds = SwarmView(8, servers), frozenset[str](), 0
    while chosen := asked(view, known=known, most=most):
        assert len(chosen) <= most
        assert known.isdisjoint(chosen)
        known, rounds = known | set(chosen), rounds + 1
    assert len(known) == 300
    assert rounds == -(-300 // most)


def test_where_a_head_is_needed_servers_that_offer_one_are_pinged():
    plain = [server(f"plain{index}", "0:8", 1000.0) for index in range(5)]
    headed = server("headed", "4:8", 0.1, head=True)
    assert "headed" in asked(SwarmView(8, (*plain, headed)), most=4, head=True)
