"""A tensor is packed where it is there sooner then, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.network.goodput import (
    BURST_BYTES,
    FIRST_GUESSES,
    LARGE_BYTES,
    MIN_BYTES,
    NUM_SEEN,
    STALE_BYTES,
    UNPACKING,
    Arriving,
    Begun,
    Coder,
    Told,
    packs,
)

BFLOAT16 = FIRST_GUESSES["bfloat16"]
MBIT = 1e6 / 8
PREFILL = 1024 * 2048 * 2
TOKEN = 2048 * 2


def arrived(arriving: Arriving, num_bytes: int, *, at: float, seconds: float) -> Arriving:
    begun = arriving.begun(now=at)
    return begun.ended(Begun(at, begun.frame_seconds), num_bytes, now=at + seconds)


def test_a_prefill_is_packed_on_a_slow_line_and_raw_on_loopback() -> None:
    assert packs(PREFILL, BFLOAT16, goodput=100 * MBIT)
    assert not packs(PREFILL, BFLOAT16, goodput=1e9)


def test_a_line_that_was_not_measured_is_raw() -> None:
    assert not packs(PREFILL, BFLOAT16, goodput=None)


def test_a_token_is_packed_only_where_its_few_bytes_take_long() -> None:
    assert not packs(TOKEN, BFLOAT16, goodput=100 * MBIT)
    assert packs(TOKEN, BFLOAT16, goodput=1 * MBIT)


def test_a_coder_that_is_slower_than_the_line_is_not_used() -> None:
    assert not packs(PREFILL, Coder(0.7, seconds_per_byte=1 / (50 * MBIT)), goodput=100 * MBIT)


def test_numbers_that_do_not_become_smaller_are_raw() -> None:
    assert not packs(PREFILL, Coder(0.96), goodput=1 * MBIT)


@given(st.integers(1, 1 << 28), st.floats(0.5, 1.5), st.floats(1e-11, 1e-6), st.floats(1e3, 1e11))
def test_packed_is_never_slower_by_what_was_measured(
    num_bytes: int, ratio: float, coder: float, goodput: float
) -> None:
    if packs(num_bytes, Coder(ratio, coder), goodput=goodput):
        assert ratio * num_bytes / goodput + UNPACKING * coder * num_bytes < num_bytes / goodput


def test_a_coder_that_was_slow_once_is_tried_again() -> None:
    coder = BFLOAT16
    for _ in range(20):
        coder = coder.after(PREFILL, PREFILL // 2, seconds=10.0)
    slow = coder
    assert not packs(PREFILL, coder, goodput=100 * MBIT)
    for _ in range(400):
        coder = coder.after_sending_raw(BFLOAT16, PREFILL)
    assert packs(PREFILL, coder, goodput=100 * MBIT)
    assert coder.seconds_per_byte < slow.seconds_per_byte


def test_one_tensor_that_waits_for_a_core_does_not_make_the_coder_slow() -> None:
    assert packs(PREFILL, BFLOAT16.after(PREFILL, PREFILL * 7 // 10, seconds=10.0), goodput=100 * MBIT)


def test_small_tensors_that_do_not_become_smaller_say_little_of_large_ones() -> None:
    coder = BFLOAT16
    for _ in range(100):
        coder = coder.after(64, 64, seconds=1e-5)
    assert packs(PREFILL, coder, goodput=100 * MBIT)


def test_a_tensor_that_is_smaller_than_a_code_is_raw_on_the_slowest_line() -> None:
    assert not packs(MIN_BYTES - 1, BFLOAT16, goodput=1.0)


def test_the_goodput_of_a_line_is_what_came_after_the_header_by_seconds() -> None:
    first = arrived(Arriving(), BURST_BYTES + (4 << 20), at=7.0, seconds=0.5)
    assert first.goodput is None  # it may have been a bad moment
    assert arrived(first, BURST_BYTES + (4 << 20), at=8.0, seconds=0.5).goodput == 8 << 20


def test_small_frames_tell_nothing() -> None:
    assert arrived(Arriving(), LARGE_BYTES - 1, at=0.0, seconds=1.0).seen == ()


def test_a_frame_that_was_given_up_tells_nothing() -> None:
    after = arrived(Arriving(), 0, at=0.0, seconds=1.0)
    assert (after.seen, after.num_open) == ((), 0)


@given(st.integers(1, 8))
def test_frames_that_share_a_line_show_what_it_carries(num_frames: int) -> None:
    arriving, size, rate = Arriving(), 1 << 20, 1 << 20
    frames = []
    for _ in range(num_frames):
        arriving = arriving.begun(now=3.0)
        frames.append(Begun(3.0, arriving.frame_seconds))
    for frame in frames:  # all end together
        arriving = arriving.ended(frame, BURST_BYTES + size, now=3.0 + num_frames * size / rate)
    assert arriving.seen == (rate,) * num_frames
    assert arriving.num_open == 0


@pytest.mark.parametrize("seconds", [1e-6, 9.0])
def test_one_busy_moment_of_the_receiver_makes_a_line_neither_slow_nor_fast(seconds: float) -> None:
    arriving = Arriving()
    for at in range(NUM_SEEN - 1):
        arriving = arrived(arriving, 1 << 20, at=float(at), seconds=1 / 64)
    assert arrived(arriving, 1 << 20, at=float(NUM_SEEN), seconds=seconds).goodput == arriving.goodput


def test_a_line_that_becomes_slower_is_known_after_a_few_frames() -> None:
    arriving = arrived(Arriving(), 1 << 20, at=0.0, seconds=0.01)
    for at in range(1, NUM_SEEN + 1):
        arriving = arrived(arriving, BURST_BYTES + (1 << 20), at=10.0 * at, seconds=1.0)
    assert arriving.goodput == 1 << 20


def test_what_was_told_is_forgotten_when_the_receiver_says_nothing_more() -> None:
    told = Told(100 * MBIT).after_sending(STALE_BYTES)
    assert told.goodput == 100 * MBIT
    assert told.after_sending(1).goodput is None
