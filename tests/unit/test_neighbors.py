"""Which servers a server measures its distance to."""

from __future__ import annotations

import random
from dataclasses import replace

from shoal.peers import MAX_NEIGHBORS, ServerState
from shoal.policy.view import SwarmView
from shoal.server.neighbors import STRANGERS, choose_neighbors, may_be_next

from .test_routing import server

ME = server("me", "4:8")


def test_those_may_be_next_whose_span_goes_on_where_ours_ends_or_the_other_way_round():
    assert all(may_be_next(ME, server("other", span)) for span in ("8:12", "6:12", "5:9", "0:4", "2:6", "3:7"))
    assert not any(may_be_next(ME, server("other", span)) for span in ("4:8", "5:7", "0:12", "9:12", "0:3"))


def test_servers_with_other_weights_never_meet():
    assert not may_be_next(ME, replace(server("other", "8:12"), fingerprint="g"))


def test_neighbours_are_others_who_are_online():
    gone = server("gone", "8:12", state=ServerState.LEAVING)
    view = SwarmView(12, (ME, gone, server("next", "8:12"), server("far", "10:12")))
    assert [each.peer for each in choose_neighbors(view, ME, {}, random.Random(0))] == ["next"]


def test_the_nearest_are_measured_again_and_some_others_are_tried():
    others = [server(f"n{index}", "8:12") for index in range(40)]
    known = {f"n{index}": 0.001 * index for index in range(20)}
    chosen = [each.peer for each in choose_neighbors(SwarmView(12, (ME, *others)), ME, known, random.Random(0))]
    nearest = MAX_NEIGHBORS - STRANGERS
    assert len(set(chosen)) == MAX_NEIGHBORS
    assert chosen[:nearest] == [f"n{index}" for index in range(nearest)]
    assert not any(peer in known for peer in chosen[nearest:])


def test_whoever_was_far_comes_back_when_everybody_has_been_tried():
    others = [server(f"n{index}", "8:12") for index in range(20)]
    known = {each.peer: 0.1 for each in others}
    assert len(choose_neighbors(SwarmView(12, (ME, *others)), ME, known, random.Random(0))) == MAX_NEIGHBORS
