"""A machine's clock is wrong if most others agree on another time."""

from __future__ import annotations

import pytest

from shoal.policy.clocks import TOLERATED_SECONDS, USABLE_SECONDS, ClockError, clock_error


@pytest.mark.parametrize(
    ("ahead", "error"),
    [
        ([], None),
        ([0.1, -0.2, TOLERATED_SECONDS], None),
        ([300.2, 300.0, 299.9], ClockError(300.0, 3)),
        ([-301.0], ClockError(-301.0, 1)),
        ([300.0, 0.1], None),  # one of the others is wrong, or both this machine and the other: no reason to blame it
        ([300.0, 300.0, 0.1], ClockError(300.0, 2)),
        ([300.0, -7000.0, 40.0], None),  # they do not agree with each other either
        ([300.0, 302.0, -7000.0], ClockError(300.0, 2)),
    ],
)
def test_a_clock_is_wrong_if_most_others_agree_on_another_time(ahead: list[float], error: ClockError | None) -> None:
    assert clock_error(ahead) == error


def test_the_words_say_by_how_much_in_which_direction_and_of_how_many() -> None:
    assert str(ClockError(300.4, 3)) == "this machine's clock is 5 minutes ahead of that of 3 members"
    assert str(ClockError(-41, 2)) == "this machine's clock is 41 s behind that of 2 members"
    assert str(ClockError(-7200, 1)) == "this machine's clock is 2 hours behind that of the member that answers"
    assert str(ClockError(400_000, 2)).startswith("this machine's clock is 5 days ahead")
    assert "wrong" in ClockError(300, 1).hint
    assert "wrong" not in ClockError(300, 2).hint


def test_a_small_difference_can_be_lived_with() -> None:
    assert ClockError(USABLE_SECONDS, 2).is_usable
    assert not ClockError(-USABLE_SECONDS - 1, 2).is_usable
