"""When a server is pinged, lost or stuck, as a pure decision."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.liveness import MIN_PING_SECONDS, PING_SECONDS, STUCK_FACTOR, STUCK_SECONDS, Liveness

seconds = st.floats(0, 1e6)


@given(st.none() | seconds)
def test_the_ping_interval_stays_within_its_limits(usual_seconds: float | None):
    liveness = Liveness(awaited_since=0.0, usual_seconds=usual_seconds)
    assert MIN_PING_SECONDS <= liveness.ping_interval <= PING_SECONDS


@given(seconds, seconds, seconds, seconds)
def test_a_server_has_its_patience_from_the_last_of_ping_request_and_sign_of_life(
    pinged_at: float, awaited_since: float, heard_at: float, patience: float
):
    liveness = Liveness(awaited_since=awaited_since).after_sending(is_ping=True, now=pinged_at)
    lost_at = max(pinged_at, awaited_since, heard_at) + patience
    assert liveness.lost_in(heard_at=heard_at, patience=patience, now=lost_at) == 0
    assert liveness.lost_in(heard_at=heard_at, patience=patience, now=lost_at + 1) < 0


def test_a_ping_is_the_last_message_until_another_is_sent_or_awaited():
    pinged = Liveness(awaited_since=0.0).after_sending(is_ping=True, now=1.0)
    assert pinged.ping_is_last
    assert not pinged.after_sending(is_ping=False, now=2.0).ping_is_last
    assert not pinged.after_request(0.1, now=2.0).ping_is_last
    assert pinged.after_sending(is_ping=False, now=2.0).pinged_at == 1.0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.booleans()), max_size=30))
def test_a_server_is_stuck_only_if_all_its_pongs_say_that_it_works_and_count_the_same(pongs):
    """Each pong comes 10 s after the one before; a message may come before it."""
    liveness, since, count = Liveness(awaited_since=0.0, usual_seconds=1.0), None, 0
    for number, (working, num_passes, has_message) in enumerate(pongs):
        now = 10.0 * number
        if has_message:
            liveness, since = liveness.after_message(), None
        liveness = liveness.after_pong(working=working, num_passes=num_passes, now=now)
        if since is None or not working or num_passes != count:
            since, count = now, num_passes
        stuck = now - since > STUCK_SECONDS + STUCK_FACTOR * 1.0
        assert liveness.stuck_seconds(now) == (now - since if stuck else None)
