"""How a link delays and throttles bytes, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.testing.link import Link, LinkDirection

SENDS = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1 << 20)), min_size=1, max_size=50)
"""Sends: the seconds before each, and its bytes."""


def test_a_plain_link_changes_nothing():
    direction = LinkDirection(Link())
    assert direction.link.is_transparent
    assert [direction.send(1 << 20, now) for now in (1.0, 1.0, 2.5)] == [1.0, 1.0, 2.5]
    assert direction.queue_free_at() < 2.5


def test_delay_is_the_same_for_all_sizes():
    direction = LinkDirection(Link(delay_seconds=0.05))
    assert [direction.send(size, 10.0) for size in (1, 1 << 30)] == [10.05, 10.05]


def test_what_is_sent_while_the_link_is_busy_arrives_afterwards():
    direction = LinkDirection(Link(delay_seconds=1.0, bytes_per_second=100.0))
    assert [direction.send(200, 0.0), direction.send(100, 0.0), direction.send(100, 1.0)] == [3.0, 4.0, 5.0]


def test_an_idle_link_saves_up_no_capacity():
    direction = LinkDirection(Link(bytes_per_second=100.0))
    assert [direction.send(100, 0.0), direction.send(100, 50.0)] == [1.0, 51.0]


def test_a_sender_that_filled_the_queue_waits_until_it_has_room():
    direction = LinkDirection(Link(bytes_per_second=100.0, queue_seconds=0.5))
    direction.send(100, 0.0)
    assert direction.queue_free_at() == 0.5


@given(SENDS)
def test_a_link_never_exceeds_its_speed(sends):
    direction = LinkDirection(Link(bytes_per_second=1e6))
    now, first, last, total = 0.0, sends[0][0], 0.0, 0
    for pause, size in sends:
        now += pause
        arrival = direction.send(size, now)
        total += size
        assert arrival >= last
        assert arrival >= first + total / 1e6 - 1e-6
        last = arrival
    assert direction.num_bytes == total


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=50), st.floats(0, 1))
def test_a_sender_that_waits_for_room_is_never_behind_a_longer_queue(sizes, queue_seconds):
    direction, now = LinkDirection(Link(bytes_per_second=1e6, queue_seconds=queue_seconds)), 0.0
    for size in sizes:
        now = max(now, direction.queue_free_at())
        assert direction.send(size, now) - now <= queue_seconds + size / 1e6 + 1e-6


@given(st.integers(0, 1000))
def test_jitter_is_bounded_and_a_seed_repeats_it(seed):
    link = Link(delay_seconds=1.0, jitter_seconds=0.5)
    first, second = (
        [direction.send(1, 0.0) for _ in range(20)]
        for direction in (LinkDirection(link, seed=seed), LinkDirection(link, seed=seed))
    )
    assert first == second
    assert all(1.0 <= arrival <= 1.5 for arrival in first)
    assert len(set(first)) > 1


def test_a_new_link_does_not_wait_for_the_old_one():
    direction = LinkDirection(Link(bytes_per_second=1.0))
    direction.send(1000, 0.0)
    direction.set_link(Link(delay_seconds=0.5))
    assert direction.send(1000, 1.0) == 1.5
    assert direction.num_bytes == 2000


@pytest.mark.parametrize(("speed", "size"), [(None, 256 << 10), (100e6 / 8, 12500), (1e3, 2 << 10), (1e12, 256 << 10)])
def test_a_slice_is_a_millisecond_of_the_link(speed, size):
    assert Link(bytes_per_second=speed).slice_bytes == size


@pytest.mark.parametrize(
    "wrong", [{"delay_seconds": -1.0}, {"jitter_seconds": -1.0}, {"queue_seconds": -1.0}, {"bytes_per_second": 0.0}]
)
def test_impossible_links_are_refused(wrong):
    with pytest.raises(ValueError, match="a link"):
        Link(**wrong)
