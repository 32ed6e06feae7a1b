"""Which servers a server measures its round trips to."""

from __future__ import annotations

import random
from dataclasses import replace

from shoal.peers import MAX_NEIGHBORS, ServerState
from shoal.policy.nearest import EXPLORED, choose_neighbors, may_be_next
from shoal.policy.view import SwarmView

from .test_routing import server

ME = server("me", "4:8")


def test_a_server_can_be_next_if_its_span_continues_this_one_or_is_continued_by_it():
    assert all(may_be_next(ME, server("other", span)) for span in ("8:12", "6:12", "5:9", "0:4", "2:6", "3:7"))
    assert not any(may_be_next(ME, server("other", span)) for span in ("4:8", "5:7", "0:12", "9:12", "0:3"))


def test_servers_with_different_weights_are_never_neighbors():
    assert not may_be_next(ME, replace(server("other", "8:12"), fingerprint="g"))


def test_neighbors_are_other_servers_that_are_online():
    gone = server("gone", "8:12", state=ServerState.LEAVING)
    view = SwarmView(12, (ME, gone, server("next", "8:12"), server("far", "10:12")))
    assert [each.peer for each in choose_neighbors(view, ME, {}, random.Random(0))] == ["next"]


def test_the_nearest_servers_are_measured_again_and_some_others_are_tried():
    others = [server(f"n{index}", "8:12") for index in range(40)]
    known = {f"n{index}": 0.001 * index for index in range(20)}
    chosen = [each.peer for each in choose_neighbors(SwarmView(12, (ME, *others)), ME, known, random.Random(0))]
    nearest = MAX_NEIGHBORS - EXPLORED
    assert len(set(chosen)) == MAX_NEIGHBORS
    assert chosen[:nearest] == [f"n{index}" for index in range(nearest)]
    assert not any(peer in known for peer in chosen[nearest:])


def test_a_far_server_is_measured_again_when_all_others_have_been_tried():
    others = [server(f"n{index}", "8:12") for index in range(20)]
    known = {each.peer: 0.1 for each in others}
    assert len(choose_neighbors(SwarmView(12, (ME, *others)), ME, known, random.Random(0))) == MAX_NEIGHBORS
