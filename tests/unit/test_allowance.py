"""How many bytes a peer may read from the directory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.census.allowance import LARGEST_DEBT, Allowance


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 50)), min_size=1, max_size=50))
def test_what_is_read_in_the_long_run_is_what_is_allowed(reads: list[tuple[float, float]]):
    allowance, now, spent = Allowance.full(100.0), 1000.0, 0.0
    for wait, num_bytes in reads:
        now += wait
        if allowance.allows(now=now):
            allowance, spent = allowance.spent(num_bytes, now=now), spent + num_bytes
    assert spent <= 100.0 + 100.0 * (now - 1000.0) / 60 + 50.0 + 1e-6


def test_a_read_that_took_too_much_is_paid_for_by_waiting():
    allowance = Allowance.full(60.0).spent(100.0, now=5.0)
    assert not allowance.allows(now=44.0)
    assert allowance.allows(now=46.0)
    assert allowance.left(now=1e6) == 60.0


def test_an_urgent_read_runs_up_a_debt_that_is_limited():
    allowance = Allowance.full(60.0).spent(100.0, now=0.0)
    assert allowance.allows(now=0.0, urgent=True)
    assert not allowance.spent(LARGEST_DEBT * 60, now=0.0).allows(now=0.0, urgent=True)


def test_time_that_goes_back_gives_nothing():
    allowance = Allowance.full(60.0).spent(60.0, now=100.0)
    assert allowance.left(now=50.0) == pytest.approx(0.0)
