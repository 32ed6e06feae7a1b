"""Inputs of passes that came too early: whatever peers push, little of it is held, and the right one is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import PassInputs
from shoal.server.rpc.pushing.unclaimed_pushes import (
    HOLD_SECONDS,
    LEAST_BYTES,
    MAX_PEER_BYTES,
    MAX_UNCLAIMED_BYTES,
    UnclaimedPushes,
)

MIB = 1 << 20


def hold(unclaimed: UnclaimedPushes, peer: str, number: int, num_bytes: int, *, now: float = 0.0) -> None:
    """A push over a link of this number; it takes no memory."""
    tensors = {"hidden": torch.zeros(1, dtype=torch.uint8).expand(num_bytes)}
    unclaimed.hold(peer, PassInputs(link=f"{number:032x}"), tensors, now=now)


def claimed(unclaimed: UnclaimedPushes, peer: str, number: int) -> int | None:
    """The bytes of what is claimed over a link."""
    found = unclaimed.claim(peer, f"{number:032x}")
    return None if found is None else found[1]["hidden"].nbytes


def test_a_push_is_claimed_once_by_its_peer_and_link() -> None:
    unclaimed = UnclaimedPushes()
    hold(unclaimed, "one", 1, 8)
    hold(unclaimed, "other", 1, 16)
    hold(unclaimed, "one", 1, 99)  # the second one over a link means nothing
    assert claimed(unclaimed, "one", 2) is None
    assert claimed(unclaimed, "one", 1) == 8
    assert claimed(unclaimed, "one", 1) is None
    assert claimed(unclaimed, "other", 1) == 16
    assert not len(unclaimed)


def test_what_nothing_claims_is_dropped_after_a_while() -> None:
    unclaimed = UnclaimedPushes()
    assert unclaimed.sweep(0.0) is None
    hold(unclaimed, "one", 1, 8, now=1.0)
    hold(unclaimed, "one", 2, 16, now=3.0)
    hold(unclaimed, "one", 1, 8, now=5.0)  # it does not make the first one younger
    assert unclaimed.sweep(1.0 + HOLD_SECONDS / 2) == 1.0 + HOLD_SECONDS
    assert len(unclaimed) == 2
    assert unclaimed.sweep(1.0 + HOLD_SECONDS) == 3.0 + HOLD_SECONDS
    assert claimed(unclaimed, "one", 1) is None
    assert claimed(unclaimed, "one", 2) == 16
    assert unclaimed.sweep(3.0 + HOLD_SECONDS) is None


@pytest.mark.parametrize("num_bytes", [1, 4 * MIB])
def test_peers_that_push_much_take_the_room_from_themselves(num_bytes: int) -> None:
    unclaimed = UnclaimedPushes()
    hold(unclaimed, "honest", 0, MIB)
    for number in range(300):
        hold(unclaimed, f"greedy{number % 3}", number, num_bytes)
    assert claimed(unclaimed, "honest", 0) == MIB
    assert claimed(unclaimed, "greedy2", 299) == num_bytes
    assert claimed(unclaimed, "greedy0", 0) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99), st.integers(0, 80 * MIB)), max_size=200))
def test_no_more_is_held_than_is_allowed(pushes: list[tuple[str, int, int]]) -> None:
    unclaimed = UnclaimedPushes()
    for peer, number, num_bytes in pushes:
        hold(unclaimed, peer, number, num_bytes)
        assert len(unclaimed) <= MAX_UNCLAIMED_BYTES // LEAST_BYTES
    sizes = {peer: [claimed(unclaimed, peer, number) or 0 for number in range(100)] for peer in "abc"}
    assert all(sum(each) <= MAX_PEER_BYTES for each in sizes.values())
    assert sum(map(sum, sizes.values())) <= MAX_UNCLAIMED_BYTES
