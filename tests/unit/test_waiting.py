"""How long a client waits, when it looks again, and what it says of those that load what it lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.peers import ServerInfo, ServerState
from shoal.policy.view import SwarmView
from shoal.policy.waiting import (
    ANNOUNCED_SECONDS,
    LATE_LOOK_SECONDS,
    LATE_SECONDS,
    LOOK_SECONDS,
    MissingSince,
    loaders,
    outlook,
    seconds_to_look,
    seconds_to_ready,
)
from shoal.spans import Span

from .test_routing import server


def loading(peer: str, span: str, ready_at: float | None) -> ServerInfo:
    return replace(server(peer, span, state=ServerState.JOINING), ready_at=ready_at)


def view(*servers: ServerInfo) -> SwarmView:
    return SwarmView(8, servers)


def test_a_client_lacks_each_block_since_it_first_lacked_it():
    missing_since = MissingSince().also([2, 3], now=10.0).also([3, 4], now=15.0)
    assert missing_since.seconds([4], now=20.0) == 5.0
    assert missing_since.seconds([3, 4], now=20.0) == 10.0
    assert missing_since.seconds([7], now=20.0) == 0.0


def test_blocks_are_ready_when_the_last_of_them_is_and_each_when_its_first_server_is():
    slow, quick, other = loading("slow", "0:4", 90.0), loading("quick", "0:4", 40.0), loading("other", "4:8", 70.0)
    assert seconds_to_ready(view(slow, quick), [0, 3], now=10.0) == 30.0
    assert seconds_to_ready(view(slow, quick, other), [3, 4], now=10.0) == 60.0
    assert seconds_to_ready(view(quick), [3], now=55.0) == -15.0


def test_nothing_is_expected_of_blocks_that_no_server_loads_or_says_when():
    assert seconds_to_ready(view(loading("a", "0:4", 40.0)), [3, 4], now=0.0) is None
    assert seconds_to_ready(view(loading("a", "0:4", None)), [3], now=0.0) is None
    assert seconds_to_ready(view(), [3], now=0.0) is None


def test_pinned_blocks_are_loaded_by_their_peer_only():
    pinned = replace(view(loading("a", "0:4", 40.0)), pinned=((Span(0, 8), "b"),))
    assert seconds_to_ready(pinned, [3], now=0.0) is None
    assert loaders(pinned, [3]) == frozenset()


@pytest.mark.parametrize(
    ("ready_in", "seconds"),
    [
        (None, LOOK_SECONDS),
        (60.0, LOOK_SECONDS),
        (1.0, 1.0 + ANNOUNCED_SECONDS),
        (0.0, LATE_LOOK_SECONDS),
        (-5.0, LATE_LOOK_SECONDS),
        (-LATE_SECONDS - 1, LOOK_SECONDS),
    ],
)
def test_the_client_looks_again_when_servers_expect_to_be_ready_and_every_few_seconds(
    ready_in: float | None, seconds: float
):
    assert seconds_to_look(ready_in) == seconds


@given(st.none() | st.floats(-1e9, 1e9))
def test_the_client_never_looks_in_a_loop_and_never_sleeps_for_long(ready_in: float | None):
    assert 0.5 <= seconds_to_look(ready_in) <= LOOK_SECONDS


def test_the_outlook_names_the_servers_that_load_the_blocks_and_the_blocks_that_no_server_loads():
    mia = replace(loading("peer-mia", "2:4", 52.0), name="mia")
    assert outlook(view(mia), [2, 3], now=10.0) == "mia loads 2:4 and expects to be ready in 42 s"
    assert outlook(view(mia), [3, 4], now=60.0) == (
        "mia loads 2:4 and should have been ready 8 s ago, no server loads 4:5 yet"
    )
    assert outlook(view(loading("abcdefgh", "2:4", None)), [2], now=0.0) == "cdefgh loads 2:4"
    assert outlook(view(), [2], now=0.0) == "the swarm is asked again every 3 s"


def test_of_many_servers_that_load_the_same_blocks_the_soonest_are_named():
    servers = [loading(f"peer-{index}", "0:4", 100.0 - index) for index in range(9)]
    said = outlook(view(*servers), [1], now=0.0)
    assert said.startswith("peer-8 loads 0:4 and expects to be ready in 92 s, peer-7")
    assert said.endswith("and 6 more load some of them")
    assert len(loaders(view(*servers), [1])) == 9
