"""Failures of servers: how they are drawn, and how they are applied."""

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
def test_every_block_always_has_a_healthy_server(seed):
    down: dict[int, Act] = {}
    healthy_at = dict.fromkeys(range(len(SPANS)), 0.0)
    events = churn(seed)
    assert events
    for event in events:
        if event.act in CURES:
            assert event.server not in down
            down[event.server] = event.act
            healthy = [index for index, at in healthy_at.items() if index not in down and at <= event.seconds]
            assert {block for index in healthy for block in Span.parse(SPANS[index])} == set(range(8))
        else:
            assert CURES[down.pop(event.server)] is event.act
            healthy_at[event.server] = event.seconds + SETTLE_SECONDS
    assert not down
    assert events[-1].seconds <= 600


def test_the_same_seed_draws_the_same_events():
    assert churn(1) == churn(1) != churn(2)


def test_the_only_server_of_a_block_does_not_fail():
    assert churn(0, ["0:4", "4:8"]) == ()


class RecordingSwarm:
    """A swarm that only records the acts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lines: list[tuple[float, int, Act]] = []
        self._clock = clock

    def do(self, server: int, act: Act) -> None:
        self.lines.append((self._clock(), server, act))


def test_events_are_applied_in_order_and_at_their_times():
    now = 0.0

    def sleep(until: float) -> bool:
        nonlocal now
        now = until
        return now < 10

    recorded = RecordingSwarm(lambda: now)
    play(recorded, [Event(7.0, 1, Act.RESTART), Event(11.0, 0, Act.CUT), Event(3.0, 1, Act.KILL)], sleep)
    assert recorded.lines == [(3.0, 1, Act.KILL), (7.0, 1, Act.RESTART)]


def test_events_after_the_end_are_not_applied():
    acts: queue.Queue[Act] = queue.Queue()

    class Listener:
        def do(self, server: int, act: Act) -> None:
            acts.put(act)

    with churning(Listener(), [Event(0.0, 0, Act.HANG), Event(3600.0, 0, Act.RESUME)]):
        assert acts.get() is Act.HANG
    assert acts.empty()


def test_a_failing_event_is_raised_at_the_end():
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
