"""How many results of a session may wait for others to take them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import MAX_STEP_TOKENS
from shoal.server.rpc.session_stream import MAX_PENDING_RESULTS, MAX_PENDING_TOKENS, may_wait


@given(st.lists(st.integers(1, MAX_STEP_TOKENS), max_size=40))
def test_what_waits_for_a_client_that_does_not_read_is_limited(sizes: list[int]):
    waiting = list[int]()
    for size in sizes:
        if may_wait(len(waiting), size):
            waiting.append(size)
    assert len(waiting) <= MAX_PENDING_RESULTS
    assert sum(waiting) <= 3 * MAX_PENDING_TOKENS


def test_four_results_of_the_largest_size_may_wait_and_sixteen_small_ones():
    assert [may_wait(number, MAX_STEP_TOKENS) for number in (3, 4)] == [True, False]
    assert [may_wait(number, MAX_STEP_TOKENS // 16) for number in (15, 16)] == [True, False]
