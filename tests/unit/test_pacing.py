"""No more than the limit of bytes is sent, and not less when there is more to send."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.network.pacing import Pacer

reservations = st.lists(st.tuples(st.floats(0, 20), st.integers(0, 5_000)), min_size=1, max_size=60)
rates = st.floats(1, 10_000)
starts = st.floats(-1e6, 1e6)


def sent(pacer: Pacer, reservations: list[tuple[float, int]], *, start: float) -> list[tuple[float, int]]:
    """When what is sent; all may be asked for at once."""
    now, times = start, []
    for pause, num_bytes in reservations:
        now += pause
        wait = pacer.reserve(num_bytes, now=now)
        assert wait >= 0.0
        times.append((now + wait, num_bytes))
    return times


@given(reservations, rates, starts)
def test_never_more_is_sent_than_the_rate_allows_and_a_burst_of_a_second(
    reservations: list[tuple[float, int]], rate: float, start: float
) -> None:
    times = sent(Pacer(rate), reservations, start=start)
    for first, (begin, _) in enumerate(times):
        total = 0
        for at, num_bytes in times[first:]:
            total += num_bytes
            assert total <= (rate * (at - begin + 1.0) + num_bytes) * (1 + 1e-6) + rate * 1e-6


@given(reservations, rates, starts)
def test_nothing_overtakes(reservations: list[tuple[float, int]], rate: float, start: float) -> None:
    times = [at for at, _ in sent(Pacer(rate), reservations, start=start)]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(times))


@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=60), rates)
def test_what_is_asked_for_at_once_is_sent_at_the_full_rate(sizes: list[int], rate: float) -> None:
    times = sent(Pacer(rate), [(0.0, size) for size in sizes], start=7.0)
    for index, (at, _) in enumerate(times):
        assert at == pytest.approx(7.0 + max(sum(sizes[:index]) / rate - 1.0, 0.0))


@given(reservations, rates, st.floats(0, 1e3))
def test_after_a_pause_nothing_waits_and_no_more_than_a_second_is_saved_up(
    reservations: list[tuple[float, int]], rate: float, pause: float
) -> None:
    pacer = Pacer(rate)
    last = max(at + num_bytes / rate for at, num_bytes in sent(pacer, reservations, start=0.0))
    now = last + pause + 1e-6
    large = round(3 * rate)
    assert pacer.reserve(large, now=now) == 0.0
    assert large / rate - 1.0 - 1e-6 <= pacer.reserve(1, now=now) <= large / rate + 1e-6


def test_one_large_thing_is_sent_at_once_and_paid_for_by_the_next() -> None:
    pacer = Pacer(100.0)
    assert pacer.reserve(1_000, now=0.0) == 0.0
    assert pacer.reserve(1, now=0.0) == pytest.approx(9.0)
    assert pacer.reserve(1, now=9.0) == pytest.approx(0.01)
