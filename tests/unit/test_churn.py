"""What goes wrong and when."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.spans import Span
from shoal.testing.churn import CURES, Act, Event, churning, play, random_churn

SPANS = ["0:4", "0:4", "4:8", "2:8", "0:8"]
SETTLE_SECONDS = 5.0


def churn(seed: int, spans: list[str] = SPANS) -> tuple[Event, ...]:
    acts = [Act.KILL, Act.STOP, Act.HANG, Act.CUT, Act.BLACK_HOLE]
    return random_churn(
        spans,
        seconds=600,
        every_seconds=4,
        down_seconds=10,
        settle_seconds=SETTLE_SECONDS,
        acts=acts,
        seed=seed,
    )


@given(st.integers(0, 10_000))
def test_at_random_every_block_keeps_a_server_that_is_well(seed):
    ill: dict[int, Act] = {}
    well_at = dict.fromkeys(range(len(SPANS)), 0.0)
    events = churn(seed)
    assert events
    for event in events:
        if event.act in CURES:
            assert event.server not in ill
            ill[event.server] = event.act
            well = [index for index, at in well_at.items() if index not in ill and at <= event.seconds]
            assert {block for index in well for block in Span.parse(SPANS[index])} == set(range(8))
        else:
            assert CURES[ill.pop(event.server)] is event.act
            well_at[event.server] = event.seconds + SETTLE_SECONDS
    assert not ill
    assert events[-1].seconds <= 600


def test_a_seed_is_enough_to_see_the_same_again():
    assert churn(1) == churn(1) != churn(2)


def test_whoever_is_needed_is_left_alone():
    assert churn(0, ["0:4", "4:8"]) == ()


class Diary:
    """A swarm to which nothing happens but that somebody writes it down."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lines: list[tuple[float, int, Act]] = []
        self._clock = clock

    def do(self, server: int, act: Act) -> None:
        self.lines.append((self._clock(), server, act))


def test_events_happen_in_their_order_and_at_their_time():
    now = 0.0

    def sleep(until: float) -> bool:
        nonlocal now
        now = until
        return now < 10

    diary = Diary(lambda: now)
    play(diary, [Event(7.0, 1, Act.RESTART), Event(11.0, 0, Act.CUT), Event(3.0, 1, Act.KILL)], sleep)
    assert diary.lines == [(3.0, 1, Act.KILL), (7.0, 1, Act.RESTART)]


def test_what_has_not_happened_at_the_end_does_not_happen():
    acts: queue.Queue[Act] = queue.Queue()

    class Listener:
        def do(self, server: int, act: Act) -> None:
            acts.put(act)

    with churning(Listener(), [Event(0.0, 0, Act.HANG), Event(3600.0, 0, Act.RESUME)]):
        assert acts.get() is Act.HANG
    assert acts.empty()


def test_an_event_that_fails_is_told_at_the_end():
    failed = threading.Event()

    class Broken:
        def do(self, server: int, act: Act) -> None:
            failed.set()
            raise RuntimeError("no such server")

    churn = churning(Broken(), [Event(0.0, 9, Act.KILL)])
    churn.__enter__()
    failed.wait()
    with pytest.raises(RuntimeError, match="no such server"):
        churn.__exit__(None, None, None)
