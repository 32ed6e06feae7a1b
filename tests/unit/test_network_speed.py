"""What a server believes of its network, and when it measures again."""

from __future__ import annotations

import pytest

from shoal.policy.network.network_speed import (
    BUFFER_BYTES,
    COPIES_SENT,
    FIRST_WAIT,
    GAP_SECONDS,
    LONGEST_WAIT,
    NUM_SLOWER,
    REFRESH_SECONDS,
    Bulk,
    NetworkEstimate,
    Seen,
)
from shoal.policy.network.transfer_budget import ALL_BYTES, MIN_CHARGE, PEER_BYTES, WINDOW_SECONDS, TransferBudget

MIB = float(1 << 20)
MEASURED = NetworkEstimate().after_measuring([(10 * MIB, 40 * MIB)], now=1000.0)


def exactly(rate: float) -> Seen:
    return Seen(rate, rate)


def after(estimate: NetworkEstimate, *rates: float, now: float = 2000.0) -> NetworkEstimate:
    """The estimate after bulks that were sent at these rates."""
    for rate in rates:
        estimate = estimate.after_traffic("up", exactly(rate), now=now)
    return estimate


def test_the_speed_is_unknown_until_both_directions_are_known() -> None:
    assert NetworkEstimate().due <= 0.0
    assert NetworkEstimate().tokens_per_second(1024) is None
    assert NetworkEstimate().after_measuring([(None, MIB), (None, None)], now=0.0).tokens_per_second(1024) is None


def test_the_slower_direction_counts_and_what_a_server_sends_it_sends_twice() -> None:
    assert MEASURED.tokens_per_second(1024) == pytest.approx(10 * MIB / COPIES_SENT / 1024)
    downhill = NetworkEstimate().after_measuring([(90 * MIB, 4 * MIB)], now=0.0)
    assert downhill.tokens_per_second(1024) == pytest.approx(4 * MIB / 1024)


def test_a_slow_or_silent_neighbor_does_not_make_the_network_look_slow() -> None:
    found = NetworkEstimate().after_measuring([(MIB, 2 * MIB), (None, None), (3 * MIB, MIB)], now=0.0)
    assert (found.up, found.down) == (3 * MIB, 2 * MIB)


def test_an_estimate_that_nothing_contradicts_is_made_again_after_hours() -> None:
    assert MEASURED.due == 1000.0 + REFRESH_SECONDS
    assert after(MEASURED, 9 * MIB, 6 * MIB, 9 * MIB, 6 * MIB).due == MEASURED.due


def test_without_an_answer_the_server_asks_again_later_and_later() -> None:
    estimate, now, waits = NetworkEstimate(), 0.0, []
    for _ in range(10):
        estimate = estimate.after_measuring([(None, None)], now=now)
        waits.append(estimate.due - now)
        now = estimate.due
    assert waits[:3] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
    assert waits[-1] == LONGEST_WAIT


def test_traffic_that_was_faster_counts_at_once() -> None:
    assert after(MEASURED, 15 * MIB).up == 15 * MIB
    assert after(MEASURED, 15 * MIB).due == MEASURED.due
    much = after(MEASURED, 30 * MIB)
    assert (much.up, much.down, much.due) == (30 * MIB, 40 * MIB, 2000.0)


def test_traffic_that_was_much_slower_several_times_makes_the_server_measure_again() -> None:
    slower = after(MEASURED, *[4 * MIB] * (NUM_SLOWER - 1))
    assert slower.due == MEASURED.due
    assert after(slower, 9 * MIB, 4 * MIB).due == MEASURED.due, "one that was as fast as expected breaks the row"
    assert after(slower, 4 * MIB).due == 2000.0
    assert after(slower, 4 * MIB).up == 10 * MIB, "the other side may have been the slow one"


def test_what_is_measured_again_replaces_what_was_believed() -> None:
    slower = after(MEASURED, *[4 * MIB] * NUM_SLOWER).after_measuring([(4 * MIB, 40 * MIB)], now=2001.0)
    assert (slower.up, slower.wait, slower.due) == (4 * MIB, FIRST_WAIT, 2001.0 + REFRESH_SECONDS)


def test_slow_peers_that_help_to_measure_do_not_disprove_what_traffic_has_shown() -> None:
    much = after(MEASURED, 30 * MIB).after_measuring([(10 * MIB, 40 * MIB)], now=2001.0)
    assert (much.up, much.down) == (30 * MIB, 40 * MIB)
    later = much.after_measuring([(10 * MIB, 40 * MIB)], now=2001.0 + REFRESH_SECONDS)
    assert later.up == 10 * MIB
    slower = after(much, *[4 * MIB] * NUM_SLOWER).after_measuring([(10 * MIB, 40 * MIB)], now=3000.0)
    assert slower.up == 10 * MIB


def test_a_server_that_measures_the_same_again_and_again_does_so_less_and_less_often() -> None:
    estimate, now = MEASURED, 2000.0
    waits = []
    for _ in range(8):
        estimate = after(estimate, *[2 * MIB] * NUM_SLOWER, now=now)
        now = estimate.due
        estimate = estimate.after_measuring([(10 * MIB, 40 * MIB)], now=now)
        now += 1.0
        waits.append(after(estimate, *[2 * MIB] * NUM_SLOWER, now=now).due - now + 1.0)
    assert waits[0] == 2 * FIRST_WAIT
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT


# What large frames show.


def sent(*frames: tuple[float, float, int]) -> Bulk:
    """A bulk of frames, each with its begin, its end and its bytes."""
    bulk = Bulk()
    moments = sorted([(begin, 1, 0) for begin, _, _ in frames] + [(end, 0, size) for _, end, size in frames])
    for now, begins, size in moments:
        bulk = bulk.opened(now=now) if begins else bulk.closed(size, now=now)
    return bulk


def test_a_bulk_that_fits_into_buffers_shows_nothing() -> None:
    assert sent((0.0, 0.001, BUFFER_BYTES)).seen is None
    assert sent((0.0, 0.0, 4 * BUFFER_BYTES)).seen is None, "no clock is that precise"


def test_what_buffers_may_hold_is_no_proof_of_speed() -> None:
    seen = sent((0.0, 2.0, 3 * BUFFER_BYTES)).seen
    assert seen == Seen(BUFFER_BYTES, 1.5 * BUFFER_BYTES)


def test_frames_that_overlap_share_the_time() -> None:
    seen = sent((0.0, 4.0, 2 * BUFFER_BYTES), (1.0, 3.0, 2 * BUFFER_BYTES)).seen
    assert seen == Seen(0.75 * BUFFER_BYTES, BUFFER_BYTES)


def test_the_time_between_frames_does_not_count_and_a_long_one_begins_another_bulk() -> None:
    close = sent((0.0, 1.0, BUFFER_BYTES), (1.05, 2.05, BUFFER_BYTES))
    assert close.seen == Seen(pytest.approx(BUFFER_BYTES / 2), pytest.approx(BUFFER_BYTES))
    assert sent((0.0, 1.0, BUFFER_BYTES), (1.0 + 2 * GAP_SECONDS, 3.0, BUFFER_BYTES)).seen is None


def test_a_frame_that_was_given_up_took_time_and_carried_nothing() -> None:
    assert sent((0.0, 8.0, 0), (8.0, 10.0, 2 * BUFFER_BYTES)).seen == Seen(0.1 * BUFFER_BYTES, 0.2 * BUFFER_BYTES)


# What a server lets others use.


def test_a_peer_gets_its_budget_and_no_more_until_later() -> None:
    budget, granted = TransferBudget(), 0
    while (more := budget.grant("mallory", MIN_CHARGE, now=5.0)) is not None:
        budget, granted = more, granted + MIN_CHARGE
    assert granted == PEER_BYTES
    assert budget.grant("mallory", 1, now=5.0 + WINDOW_SECONDS - 1) is None
    assert budget.grant("alice", MIN_CHARGE, now=5.0) is not None
    assert budget.grant("mallory", MIN_CHARGE, now=5.0 + WINDOW_SECONDS) is not None


def test_all_peers_together_have_a_budget_too() -> None:
    budget, granted = TransferBudget(), 0
    for index in range(1000):
        more = budget.grant(f"mallory {index}", PEER_BYTES // 3, now=0.0)
        if more is not None:
            budget, granted = more, granted + PEER_BYTES // 3
    assert granted == ALL_BYTES


def test_small_transfers_cost_something_too() -> None:
    budget, number = TransferBudget(), 0
    while (more := budget.grant("mallory", 16, now=0.0)) is not None:
        budget, number = more, number + 1
    assert number == PEER_BYTES // MIN_CHARGE
