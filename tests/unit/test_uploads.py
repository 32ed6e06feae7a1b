"""Which upload ends for a peer that waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.network.uploads import GRACE_SECONDS, SEND_SECONDS, Upload, gives_way

MIB = 1 << 20
UPLOADS = st.lists(st.builds(Upload, st.floats(0, 100), st.integers(1, 4 * MIB), st.integers(0, 4 * MIB)), max_size=6)


def test_a_peer_that_takes_nothing_gives_way_after_a_moment() -> None:
    silent = Upload(began=0.0, num_bytes=4 * MIB, taken=0)
    assert gives_way([silent], now=GRACE_SECONDS - 0.1) is None
    assert gives_way([silent], now=GRACE_SECONDS) is silent


def test_of_slow_peers_the_slowest_gives_way() -> None:
    slow, slower = (Upload(began=0.0, num_bytes=4 * MIB, taken=taken) for taken in (MIB // 4, MIB // 8))
    assert gives_way([slow, slower], now=10.0) is slower


def test_a_peer_that_will_be_done_in_time_goes_on() -> None:
    steady = Upload(began=0.0, num_bytes=4 * MIB, taken=MIB)  # it needs 40 s in all
    assert gives_way([steady], now=10.0) is None


@given(UPLOADS, st.floats(100, 200))
def test_none_gives_way_that_would_end_within_the_time_that_all_have(uploads: list[Upload], now: float) -> None:
    chosen = gives_way(uploads, now=now)
    late = [each for each in uploads if each.expected_seconds(now=now) > SEND_SECONDS]
    if chosen is not None:
        assert chosen in late
        assert now - chosen.began >= GRACE_SECONDS
    else:
        assert all(now - each.began < GRACE_SECONDS for each in late)
