"""What a link does to bytes, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.testing.link import Link, LinkDirection

SENDS = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1 << 20)), min_size=1, max_size=50)
"""Pauses before, and bytes."""


def test_a_plain_link_changes_nothing():
    lane = LinkDirection(Link())
    assert lane.link.is_transparent
    assert [lane.send(1 << 20, now) for now in (1.0, 1.0, 2.5)] == [1.0, 1.0, 2.5]
    assert lane.room_at() < 2.5


def test_delay_is_added_to_all_alike():
    lane = LinkDirection(Link(delay_seconds=0.05))
    assert [lane.send(size, 10.0) for size in (1, 1 << 30)] == [10.05, 10.05]


def test_who_comes_while_the_link_is_busy_comes_after():
    lane = LinkDirection(Link(delay_seconds=1.0, bytes_per_second=100.0))
    assert [lane.send(200, 0.0), lane.send(100, 0.0), lane.send(100, 1.0)] == [3.0, 4.0, 5.0]


def test_an_idle_link_saves_nothing_up():
    lane = LinkDirection(Link(bytes_per_second=100.0))
    assert [lane.send(100, 0.0), lane.send(100, 50.0)] == [1.0, 51.0]


def test_whoever_has_filled_the_queue_waits_until_there_is_room():
    lane = LinkDirection(Link(bytes_per_second=100.0, queue_seconds=0.5))
    lane.send(100, 0.0)
    assert lane.room_at() == 0.5


@given(SENDS)
def test_a_link_never_carries_more_than_it_can(sends):
    lane = LinkDirection(Link(bytes_per_second=1e6))
    now, first, last, total = 0.0, sends[0][0], 0.0, 0
    for pause, size in sends:
        now += pause
        arrival = lane.send(size, now)
        total += size
        assert arrival >= last
        assert arrival >= first + total / 1e6 - 1e-6
        last = arrival
    assert lane.num_bytes == total


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=50), st.floats(0, 1))
def test_for_who_waits_for_room_the_queue_has_an_end(sizes, queue_seconds):
    lane, now = LinkDirection(Link(bytes_per_second=1e6, queue_seconds=queue_seconds)), 0.0
    for size in sizes:
        now = max(now, lane.room_at())
        assert lane.send(size, now) - now <= queue_seconds + size / 1e6 + 1e-6


@given(st.integers(0, 1000))
def test_jitter_has_a_bound_and_is_the_same_again_with_the_same_seed(seed):
    link = Link(delay_seconds=1.0, jitter_seconds=0.5)
    first, second = (
        [lane.send(1, 0.0) for _ in range(20)]
        for lane in (LinkDirection(link, seed=seed), LinkDirection(link, seed=seed))
    )
    assert first == second
    assert all(1.0 <= arrival <= 1.5 for arrival in first)
    assert len(set(first)) > 1


def test_a_link_that_changes_owes_nothing_to_what_it_was():
    lane = LinkDirection(Link(bytes_per_second=1.0))
    lane.send(1000, 0.0)
    lane.change(Link(delay_seconds=0.5))
    assert lane.send(1000, 1.0) == 1.5
    assert lane.num_bytes == 2000


@pytest.mark.parametrize(("speed", "size"), [(None, 256 << 10), (100e6 / 8, 12500), (1e3, 2 << 10), (1e12, 256 << 10)])
def test_connections_take_turns_after_a_millisecond_of_the_link(speed, size):
    assert Link(bytes_per_second=speed).slice_bytes == size


@pytest.mark.parametrize(
    "wrong", [{"delay_seconds": -1.0}, {"jitter_seconds": -1.0}, {"queue_seconds": -1.0}, {"bytes_per_second": 0.0}]
)
def test_what_no_link_can_be_is_refused(wrong):
    with pytest.raises(ValueError, match="a link"):
        Link(**wrong)
