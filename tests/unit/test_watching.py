"""Which servers a server watches, and when it believes that one is gone."""

from __future__ import annotations

from collections import Counter

from shoal.peers import ServerState
from shoal.policy.view import SwarmView
from shoal.policy.watching import MAX_WATCHED, believed_gone, choose_watched

from .test_routing import server


def test_servers_that_alone_hold_a_block_are_watched_first():
    twins = [server(f"twin{index}", "0:8") for index in range(2 * MAX_WATCHED)]
    view = SwarmView(12, (*twins, server("alone", "8:12")))
    chosen = choose_watched(view, "me")
    assert len(chosen) == MAX_WATCHED
    assert chosen[0].peer == "alone"


def test_a_server_watches_neither_itself_nor_servers_that_leave():
    view = SwarmView(12, (server("me", "0:4"), server("gone", "4:8", state=ServerState.LEAVING), server("a", "8:12")))
    assert [each.peer for each in choose_watched(view, "me")] == ["a"]


def test_in_a_large_swarm_every_server_is_watched_by_some():
    servers = [server(f"s{index}", "0:12") for index in range(200)]
    view = SwarmView(12, tuple(servers))
    watched = Counter(each.peer for own in servers for each in choose_watched(view, own.peer))
    assert len(watched) == len(servers)
    assert max(watched.values()) <= 4 * MAX_WATCHED


def test_a_server_that_reaches_nobody_does_not_believe_that_all_are_gone():
    assert believed_gone({"a", "b"}, {"c"}) == {"a", "b"}
    assert believed_gone({"a", "b"}, set()) == set()
    assert believed_gone({"a", "b"}, {"a", "b"}) == set()
