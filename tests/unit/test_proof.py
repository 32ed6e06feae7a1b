"""Which servers are pinged before a route is chosen."""

from __future__ import annotations

import pytest

from shoal.policy.routing.costs import Costs, Measured, Needs
from shoal.policy.routing.proof import RANDOM_FRACTION, servers_to_probe, sole_holders
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .test_routing import server

ALL = Span(0, 8)


def asked(
    view: SwarmView,
    *,
    proven: frozenset[str] = frozenset(),
    silent: frozenset[str] = frozenset(),
    most: int = 8,
    head: bool = False,
    known: Measured | None = None,
) -> list[str]:
    costs = Costs(Needs(head=head), known or Measured())
    return [each.peer for each in servers_to_probe(view, ALL, costs, proven=proven, silent=silent, most=most)]


def test_a_server_that_holds_a_block_alone_is_not_pinged():
    view = SwarmView(8, (server("a", "0:6"), server("b", "4:8"), server("c", "4:6")))
    assert sole_holders(view, ALL) == {"a", "b"}
    assert sole_holders(view, Span(4, 6)) == frozenset()
    assert asked(view, proven=sole_holders(view, ALL)) == ["c"]


def test_a_server_whose_only_rival_is_out_of_view_is_pinged():
    everyone = SwarmView(8, (server("lost", "0:8"), server("new", "0:8")))
    view = everyone.only(lambda each: each.peer != "lost")
    assert asked(view, proven=sole_holders(everyone, ALL)) == ["new"]


def test_the_servers_of_the_best_routes_are_pinged_first():
    whole = [server(f"whole{index}", "0:8", 5.0) for index in range(30)]
    halves = [
        server(f"{name}{index}", span, 100.0) for index in range(3) for name, span in (("a", "0:4"), ("b", "4:8"))
    ]
    lone = [
        server(f"lone{index}", "3:5", 1000.0) for index in range(30)
    ]  # fast, and in no good route: its ends are far
    chosen = asked(SwarmView(8, (*lone, *whole, *halves)), most=8)
    assert chosen[:6] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_route_over_proven_servers_is_completed():
    proven = frozenset({"known"})
    view = SwarmView(8, (server("slow", "4:8", 1.0), server("fast", "4:8", 100.0), server("known", "0:4", 100.0)))
    assert asked(view, proven=proven, most=1) == ["fast"]


def test_if_what_is_known_is_better_than_all_claims_the_best_of_each_block_are_pinged():
    view = SwarmView(8, (server("known", "0:8", 100.0), server("a", "0:4", 1.0), server("b", "4:8", 2.0)))
    assert asked(view, proven=frozenset({"known"}), known=Measured({"known": 0.001})) == ["a", "b"]


def test_some_are_pinged_at_random_however_bold_the_others_are():
    honest = [server(f"honest{index}", "0:8", 1.0) for index in range(30)]
    bold = [server(f"bold{index}", "0:8", 1e9) for index in range(300)]
    chosen = asked(SwarmView(8, (*honest, *bold)), most=32)
    assert len(set(chosen)) == 32
    assert sum(peer.startswith("honest") for peer in chosen) == 32 // RANDOM_FRACTION


@pytest.mark.parametrize("most", [8, 32, 1000])
def test_servers_that_were_silent_are_not_pinged_again_and_all_others_in_the_end(most: int):
    servers = tuple(server(f"s{index}", "0:8", float(index)) for index in range(300))
    view, silent, rounds = SwarmView(8, servers), frozenset[str](), 0
    while chosen := asked(view, silent=silent, most=most):
        assert len(chosen) <= most
        assert silent.isdisjoint(chosen)
        silent, rounds = silent | set(chosen), rounds + 1
    assert len(silent) == 300
    assert rounds == -(-300 // most)


def test_where_a_head_is_needed_servers_that_offer_one_are_pinged():
    plain = [server(f"plain{index}", "0:8", 1000.0) for index in range(5)]
    headed = server("headed", "4:8", 0.1, head=True)
    assert "headed" in asked(SwarmView(8, (*plain, headed)), most=4, head=True)


def test_servers_that_are_preferred_are_joined_by_others_only_where_they_hold_nothing():
    view = SwarmView(8, (server("a", "0:4"), server("b", "2:4"), server("c", "3:6"), server("d", "0:8")))
    assert peers(view, {"a"}, Span(0, 4)) == ["a"]
    assert peers(view, {"a"}, Span(0, 6)) == ["a", "c", "d"]
    assert peers(view, set(), Span(0, 4)) == ["a", "b", "c", "d"]


def peers(view: SwarmView, preferred: set[str], span: Span) -> list[str]:
    return [each.peer for each in view.rather(lambda each: each.peer in preferred, span).servers]
