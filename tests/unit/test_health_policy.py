"""For how long a client keeps away from a server that failed, as a pure decision."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.health import (
    LONGEST_SECONDS,
    HealthRecord,
    after_busy,
    after_failure,
    after_misrouted,
    is_blocked,
    is_deprioritized,
)


def test_a_server_without_a_record_is_healthy():
    assert not is_deprioritized(None, 0.0)
    assert not is_blocked(None, 0.0)


def test_a_misrouted_request_deprioritizes_a_server_and_does_not_block_it():
    record = after_misrouted(None, "other blocks", now=5.0)
    assert is_deprioritized(record, 5.0)
    assert not is_blocked(record, 5.0)
    assert record.num_failures == 0


@given(st.lists(st.tuples(st.sampled_from(("failed", "busy", "misrouted")), st.floats(0, 1000)), min_size=1))
def test_a_blocked_server_is_deprioritized_and_neither_lasts_for_ever(happened: list[tuple[str, float]]):
    record: HealthRecord | None = None
    now = 0.0
    for what, later in happened:
        now += later
        match what:
            case "failed":
                record = after_failure(record, what, now=now, since=now)
            case "busy":
                record = after_busy(record, what, now=now, seconds=3.0)
            case _:
                record = after_misrouted(record, what, now=now)
        assert is_deprioritized(record, now)
        assert record.blocked_until <= record.deprioritized_until <= now + LONGEST_SECONDS
    assert record is not None
    assert record.num_failures <= sum(what == "failed" for what, _ in happened)
    assert not is_blocked(record, now + LONGEST_SECONDS)
    assert not is_deprioritized(record, now + LONGEST_SECONDS)
