"""Which frames are received at the same time: none is kept out by senders that never end theirs."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.network.frame_room import (
    FREE_BYTES,
    GRACE_SECONDS,
    IMBALANCE,
    PATIENCE_SECONDS,
    SMALL_BYTES,
    Frame,
    gives_way,
    next_frame,
)

MIB = 1 << 20
LINK = 128 * 1024
ROOM, OF_PEER = 32 * MIB, 8 * MIB


def frame(peer: str, num_bytes: int = 4 * MIB, *, network: str = "", since: float = 0.0, received: int = 0) -> Frame:
    return Frame(peer, network or f"net of {peer}", num_bytes, since, received)


def chosen(held: list[Frame], waiting: list[Frame]) -> int | None:
    return next_frame(held, waiting, max_bytes=ROOM, max_peer_bytes=OF_PEER)


def ended(held: list[Frame], waiting: list[Frame], now: float) -> int | None:
    return gives_way(held, waiting, max_peer_bytes=OF_PEER, slowest_link=LINK, now=now)


def test_the_frames_of_a_peer_wait_for_each_other_and_not_for_those_of_others():
    held = [frame("p"), frame("p")]
    assert chosen(held, [frame("p"), frame("q")]) == 1
    assert chosen(held, [frame("p")]) is None


def test_of_those_that_wait_the_network_that_holds_least_is_next():
    held = [frame("a", network="large"), frame("b", network="large"), frame("c", network="small", num_bytes=MIB)]
    assert chosen(held, [frame("d", network="large"), frame("e", network="small")]) == 1


def test_a_frame_larger_than_all_room_is_received_alone():
    assert chosen([], [frame("p", 2 * ROOM)]) == 0
    assert chosen([frame("q")], [frame("p", 2 * ROOM)]) is None


def test_a_token_does_not_wait_for_the_frames_of_other_networks():
    held = [frame(f"p{index}", network="attacker") for index in range(8)]
    assert chosen(held, [frame("q", 4 * MIB)]) is None
    assert chosen(held, [frame("q", 4 * MIB), frame("client", SMALL_BYTES)]) == 1
    at_its_limit = [*held, frame("client", FREE_BYTES)]
    assert chosen(at_its_limit, [frame("client", SMALL_BYTES)]) is None


def test_a_frame_that_does_not_go_on_ends_only_when_another_waits():
    held = [frame("stalled"), frame("slow", received=int(20 * LINK))]
    late = GRACE_SECONDS + 1
    assert ended(held, [], late) is None
    assert ended(held, [frame("q", since=late)], late) == 0
    assert ended(held, [frame("q", since=GRACE_SECONDS)], GRACE_SECONDS) is None


def test_a_frame_that_waits_for_its_own_peer_ends_none_of_others():
    held = [frame("stalled"), frame("p", received=100 * LINK), frame("p", received=100 * LINK)]
    assert ended(held, [frame("p", since=0.0)], 50.0) is None
    held[1] = frame("p")
    assert ended(held, [frame("p", since=0.0)], 50.0) == 1


def test_frames_of_one_peer_share_its_link():
    late = GRACE_SECONDS + 8
    held = [frame("p", received=LINK) for _ in range(8)]
    assert ended(held, [frame("q", since=late)], late) is None
    assert ended(held[:4], [frame("q", since=late)], late) == 0


def test_a_network_that_holds_much_gives_way_to_one_that_waits():
    held = [frame(f"p{index}", network="attacker", received=index * MIB // 4) for index in range(8)]
    waiting = [frame("client", since=0.0)]
    assert ended(held, waiting, PATIENCE_SECONDS / 2) is None
    assert ended(held, waiting, PATIENCE_SECONDS) == 0


frames = st.builds(
    lambda peer, size, since: Frame(f"p{peer}", f"net {peer % 3}", size, since),
    st.integers(0, 8),
    st.one_of(st.integers(1, SMALL_BYTES), st.integers(1, 8 * MIB)),
    st.floats(0, 10),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(frames, max_size=40))
def test_the_room_is_never_exceeded_and_never_left_unused(all_frames: list[Frame]):
    held: list[Frame] = []
    waiting = list(all_frames)
    while waiting:
        while (index := chosen(held, waiting)) is not None:
            held.append(waiting.pop(index))
            large = sum(each.num_bytes for each in held if each.num_bytes > SMALL_BYTES)
            assert large <= ROOM
            of_network = Counter[str]()
            for each in held:
                of_network[each.network] += each.num_bytes
            assert sum(of_network.values()) <= ROOM + FREE_BYTES * len(of_network)
        if waiting:
            assert held, "what waits has something to wait for"
            held.pop(0)


@settings(max_examples=200, deadline=None)
@given(st.lists(frames, max_size=20), st.lists(frames, min_size=1, max_size=5), st.floats(0, 60))
def test_what_gives_way_is_late_or_of_a_network_that_holds_much_more(
    held: list[Frame], waiting: list[Frame], now: float
):
    index = ended(held, waiting, now)
    if index is None:
        return
    given_up = held[index]
    of_peer = sum(each.peer == given_up.peer for each in held)
    is_late = given_up.num_received < (now - given_up.since - GRACE_SECONDS) * LINK / of_peer
    of_network = sum(each.num_bytes for each in held if each.network == given_up.network)
    assert is_late or any(
        of_network > IMBALANCE * (sum(e.num_bytes for e in held if e.network == w.network) + w.num_bytes)
        for w in waiting
    )
