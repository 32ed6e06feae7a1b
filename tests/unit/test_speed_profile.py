"""How fast a server would be with a span of any length."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.peers import MAX_SPEED_POINTS
from shoal.policy.machines.max_blocks import CACHE_SHARE, MAX_CACHE_TOKENS
from shoal.policy.machines.speed_profile import (
    MAX_SPEED,
    SESSION_TOKENS,
    BlockTime,
    CacheRoom,
    SpeedProfile,
    block_speeds,
    span_lengths,
)

GIB = 2**30
SIZES = (1, 8, 32, 128)


def profile(*seconds: float, fixed: float = 0.0) -> SpeedProfile:
    """A machine whose passes for 1, 8, 32 and 128 sessions take these seconds in each block."""
    times = [BlockTime(fixed, each) for each in seconds]
    return SpeedProfile(8, times[0], times[0], 128, tuple(zip(SIZES, times, strict=False)))


def room_for(num_sessions: int) -> CacheRoom:
    """A cache of one size, whatever the span is."""
    return CacheRoom(GIB, 0, 1, num_tokens=num_sessions * SESSION_TOKENS)


times = st.floats(1e-6, 10.0)


@given(st.integers(1, 4096))
def test_the_lengths_begin_with_one_block_and_end_with_the_most_that_fit(max_blocks: int) -> None:
    lengths = span_lengths(max_blocks)
    assert lengths[0] == 1
    assert lengths[-1] == max_blocks
    assert list(lengths) == sorted(set(lengths))
    assert len(lengths) <= MAX_SPEED_POINTS


@given(
    st.lists(times, min_size=1, max_size=4),
    st.floats(1e6, 1e12),
    st.floats(0, 1e9),
    st.floats(1, 1e6),
    st.floats(0, 1e5),
    st.integers(1, 200),
)
def test_a_longer_span_is_never_faster_for_each_block(
    seconds: list[float], free: float, block: float, token: float, beside: float, max_blocks: int
) -> None:
    found = block_speeds(profile(*seconds), CacheRoom(free, block, token, beside), max_blocks)
    assert [length for length, _ in found] == sorted({length for length, _ in found})
    for (_, shorter), (_, longer) in itertools.pairwise(found):
        assert longer <= shorter * (1 + 1e-9)


def test_a_longer_span_leaves_less_cache_and_so_smaller_batches() -> None:
    room = CacheRoom(free_bytes=40 * GIB, block_bytes=GIB, token_bytes=64 * 2**10, output_bytes=16 * 2**10)
    sessions = [room.num_sessions(length) for length in (1, 4, 16)]
    assert sessions == [
        int(CACHE_SHARE * 40 * GIB // ((64 * length + 16) * 2**10)) // SESSION_TOKENS for length in (1, 4, 16)
    ]
    speeds = dict(block_speeds(profile(1e-3, 1.2e-3, 2e-3, 5e-3), room, 16))
    assert speeds[1] > 1.5 * speeds[16] > 0
    assert speeds[16] == pytest.approx(profile(1e-3, 1.2e-3, 2e-3, 5e-3).block_speed(16, num_sessions=sessions[2]))


def test_where_the_blocks_take_almost_all_memory_little_is_left_for_caches() -> None:
    room = CacheRoom(free_bytes=20 * GIB, block_bytes=GIB, token_bytes=1024)
    assert room.num_sessions(19) < room.num_sessions(10) * 10 / 19 / 3
    assert room.num_sessions(20) == room.num_sessions(25) == 1


def test_the_cache_has_a_largest_size() -> None:
    assert CacheRoom(1e15, 0, 1).num_sessions(1) == MAX_CACHE_TOKENS // SESSION_TOKENS


def test_a_cache_whose_size_the_operator_chose_is_as_large_with_any_span() -> None:
    (first, last) = block_speeds(profile(1e-3, 2e-3), room_for(8), 32)
    assert first == (1, pytest.approx(8 / 2e-3))
    assert last == (32, first[1])


def test_a_pass_through_few_blocks_is_less_worth_if_it_costs_something_beside_them() -> None:
    speeds = dict(block_speeds(profile(1e-3, 2e-3, fixed=2e-3), room_for(8), 64))
    assert speeds[1] == pytest.approx(8 / 4e-3)
    assert speeds[64] == pytest.approx(64 * 8 / (2e-3 + 64 * 2e-3))


def test_between_two_sizes_the_time_is_linear_and_beyond_the_largest_there_is_nothing_to_gain() -> None:
    measured = profile(1e-3, 8e-3, 32e-3, 64e-3)
    assert measured.block_speed(4, num_sessions=80) == pytest.approx(80 / 48e-3)
    assert measured.block_speed(4, num_sessions=128) == pytest.approx(128 / 64e-3)
    assert measured.block_speed(4, num_sessions=5000) == pytest.approx(128 / 64e-3)


def test_a_larger_batch_that_is_slower_is_not_what_a_server_is_measured_by() -> None:
    assert profile(1e-3, 1.0).block_speed(2, num_sessions=8) == pytest.approx(1 / 1e-3)


def test_a_server_that_computes_one_session_after_another_gains_nothing_by_cache() -> None:
    assert len({profile(1e-3).block_speed(2, num_sessions=number) for number in (1, 10, 1000)}) == 1


@given(times, times, st.integers(1, 200))
def test_the_time_through_the_blocks_that_were_measured_is_as_measured(one: float, whole: float, num: int) -> None:
    time = BlockTime.between(one=one, whole=whole, num_blocks=num)
    assert time.seconds(num) == pytest.approx(whole)
    assert time.fixed >= 0
    assert time.per_block > 0
    if one < whole < num * one:
        assert time.seconds(1) == pytest.approx(one)


def test_a_profile_counts_for_spans_of_similar_length() -> None:
    assert [length for length in range(1, 20) if profile(1e-3).fits(length)] == list(range(4, 17))


def test_the_speed_of_one_session_follows_from_the_length_of_the_span() -> None:
    measured = SpeedProfile(8, BlockTime(1e-3, 2e-3), BlockTime(0.0, 0.1), 128, ((1, BlockTime(0.0, 1.0)),))
    assert measured.decode_speed(8) == pytest.approx(1 / 17e-3)
    assert measured.decode_speed(4) == pytest.approx(1 / 9e-3)
    assert measured.prefill_speed(4) == pytest.approx(128 / 0.4)


def test_no_speed_is_larger_than_a_record_takes() -> None:
    assert profile(1e-12, 1e-12).block_speed(1, num_sessions=8) == MAX_SPEED


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_times_that_are_none_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="no time"):
        profile(1e-3, seconds)
    with pytest.raises(ValueError, match="no time"):
        SpeedProfile(1, BlockTime(0.0, seconds), BlockTime(0.0, 1.0), 128, ((1, BlockTime(0.0, 1.0)),))


@pytest.mark.parametrize("sizes", [(), (2,), (1, 1), (1, 8, 4)])
def test_batches_out_of_order_are_refused(sizes: tuple[int, ...]) -> None:
    time = BlockTime(0.0, 1.0)
    with pytest.raises(ValueError, match="without its passes"):
        SpeedProfile(1, time, time, 128, tuple((size, time) for size in sizes))
