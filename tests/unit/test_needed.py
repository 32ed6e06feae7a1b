"""Which blocks a machine goes on serving while it goes to others, and which it must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.peers import Capacity, ServerInfo, ServerState
from shoal.policy.machines.fleet import Fleet
from shoal.policy.machines.machine import ASSUMED_LOAD_SECONDS, Machine, kept_blocks, machines_of
from shoal.policy.placement.needed import Needed
from shoal.policy.placement.score import Changes
from shoal.spans import Span

from .test_placement import NOW, machine, swarms

NUM_BLOCKS = 8


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, NUM_BLOCKS - 1))
    return Span(start, draw(st.integers(start + 1, NUM_BLOCKS)))


# What a machine keeps


@pytest.mark.parametrize(
    ("held", "wanted", "room", "kept"),
    [
        ("0:4", "0:2", 4, Span(0, 2)),  # it shrinks
        ("0:4", "0:6", 6, Span(0, 4)),  # it grows
        ("0:4", "2:6", 6, Span(2, 4)),  # it shifts within its room
        ("0:4", "2:6", 5, None),  # it has no room for all six blocks
        ("0:4", "4:6", 8, None),  # the spans have nothing in common
    ],
)
def test_a_machine_keeps_what_both_spans_have_if_it_has_room_for_both(held, wanted, room, kept):
    assert kept_blocks(Span.parse(held), Span.parse(wanted), room) == kept
    assert machine("a", held, max_blocks=room).keeps(Span.parse(wanted)) == kept


def test_a_machine_without_blocks_keeps_none():
    assert kept_blocks(None, Span(0, 2), 4) is None


@given(spans(), spans(), st.integers(1, NUM_BLOCKS))
def test_kept_blocks_are_all_that_both_spans_have_or_none(held: Span, wanted: Span, room: int):
    room = max(room, len(held), len(wanted))
    common, together = set(held) & set(wanted), set(held) | set(wanted)
    kept = kept_blocks(held, wanted, room)
    assert set(kept or ()) == (common if len(together) <= room else set())


def test_a_machine_that_keeps_blocks_loads_only_the_others():
    one = machine("a", "0:4", max_blocks=6, load_seconds=10.0, disk_seconds=1.0, on_disk=(Span(4, 5),))
    assert one.seconds_to_load(Span(2, 6)) == 11.0
    assert one.seconds_to_load(Span(0, 2)) == 0.0
    assert replace(one, max_blocks=4).seconds_to_load(Span(2, 6)) == 31.0
    assert replace(one, span=None).seconds_to_load(Span(2, 6)) == 31.0


# Records


def server(state: ServerState = ServerState.ONLINE, **more: object) -> ServerInfo:
    capacity = Capacity(
        max_blocks=6, block_speeds=((1, 100.0),), network_speed=None, load_seconds=1.0, disk_seconds=1.0
    )
    values = {"peer": "a", "span": Span(0, 4), "state": state, "fingerprint": "", "capacity": capacity, **more}
    values |= {"decode_speed": 1.0, "prefill_speed": 1.0, "cache_tokens_left": 0}
    values |= {"dtype": "bfloat16", "quantization": "none", "version": ""}
    return ServerInfo(**values)  # type: ignore[arg-type]


def places(info: ServerInfo) -> list[tuple[Span | None, Span | None, float, bool]]:
    return [(each.span, each.serves, each.ready_at, each.movable) for each in machines_of(info, now=NOW)]


def test_an_online_server_is_one_machine():
    assert places(server()) == [(Span(0, 4), Span(0, 4), 0.0, True)]


def test_a_server_that_only_claims_other_blocks_is_where_it_serves_and_where_it_wants_to_go():
    assert places(server(wants=Span(2, 6))) == [
        (Span(0, 4), Span(0, 4), 0.0, True),
        (Span(2, 6), Span(2, 4), NOW + ASSUMED_LOAD_SECONDS, False),
    ]


def test_a_server_that_loads_while_it_serves_is_where_it_goes_and_serves_what_it_keeps():
    assert places(server(wants=Span(2, 6), ready_at=NOW + 9)) == [(Span(2, 6), Span(2, 4), NOW + 9, False)]


def test_a_server_that_loads_and_serves_nothing_does_not_move():
    assert places(server(ServerState.JOINING, ready_at=NOW + 9)) == [(Span(0, 4), None, NOW + 9, False)]


def test_a_server_that_leaves_is_no_machine():
    assert places(server(ServerState.LEAVING, wants=Span(2, 6))) == []


# What is needed of a machine


def brute_force(fleet: Fleet, relied: list[bool], row: int, wanted: Span) -> bool:
    """Whether each block that the machine holds is kept, or served by another that can be relied on."""
    served_by_others = {
        block
        for index, other in enumerate(fleet.machines)
        if relied[index] and (index != row or other.count > 1)
        for block in other.serves or ()
    }
    one = fleet.machines[row]
    return set(one.span or ()) - set(one.keeps(wanted) or ()) <= served_by_others


@settings(deadline=None)
@given(swarms(), st.data())
def test_a_machine_may_go_where_all_that_is_needed_of_it_stays_served(machines: list[Machine], data: st.DataObject):
    machines = [replace(one, count=data.draw(st.sampled_from([1, 1, 2]))) for one in machines]
    fleet = Fleet.of(machines, NUM_BLOCKS, now=NOW)
    relied = data.draw(st.lists(st.booleans(), min_size=len(machines), max_size=len(machines)))
    needed = Needed.of(fleet, np.array(relied))
    rows = np.flatnonzero(fleet.movable)
    table = needed.places(rows, 5)
    for index, row in enumerate(rows.tolist()):
        for start in range(NUM_BLOCKS):
            for end in range(start + 1, min(start + fleet.machines[row].max_blocks, NUM_BLOCKS) + 1):
                change = Changes(np.array([row]), np.array([start]), np.array([end]))
                expected = brute_force(fleet, relied, row, Span(start, end))
                assert needed.allows(change)[0] == table[index, end - start - 1, start] == expected
