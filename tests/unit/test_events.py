"""Observers are told of events, and what they do with them hurts neither the client nor each other."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from shoal import events
from shoal.events import Event, LogObserver, Observers, RouteChosen, ServerLost, SessionClosed
from shoal.spans import Span

LOST = ServerLost("12D3peer", "12D3peer is silent")


def close(observers: Observers) -> None:
    asyncio.run(observers.close())


def test_every_observer_is_told_of_every_event_in_order():
    told: list[list[Event]] = [[], []]
    observers = Observers([told[0].append, told[1].append])
    emitted = [SessionClosed(session, "m", 3) for session in range(100)]
    for event in emitted:
        observers.emit(event)
    close(observers)
    assert told == [emitted, emitted]


@pytest.mark.parametrize("place", ["observers", "direct"])
def test_an_observer_that_raises_is_logged_once_and_the_others_go_on(place: str, caplog: pytest.LogCaptureFixture):
    told: list[Event] = []

    def fail(event: Event) -> None:
        raise ValueError("no room on the disk")

    both = [fail, told.append]
    observers = Observers(both, direct=()) if place == "observers" else Observers(direct=both)
    for _ in range(3):
        observers.emit(LOST)
    close(observers)
    assert told == [LOST] * 3
    assert caplog.text.count("failed and is told nothing more") == 1
    assert caplog.text.count("ValueError: no room on the disk") == 1


def test_an_observer_that_hangs_delays_nothing_and_loses_only_its_own_events(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(events, "CLOSE_SECONDS", 0.01)
    go_on, told, late = threading.Event(), list[Event](), list[Event]()

    def hang(event: Event) -> None:
        go_on.wait(20)
        late.append(event)

    places = threading.Semaphore(events.MAX_QUEUED)  # in the queue of the quick one, which is never overrun

    def tell(event: Event) -> None:
        told.append(event)
        places.release()

    observers = Observers([hang, tell], direct=())
    for session in range(2 * events.MAX_QUEUED):
        assert places.acquire(timeout=20)
        observers.emit(SessionClosed(session, "m", 0))
    close(observers)
    assert len(told) == 2 * events.MAX_QUEUED
    assert caplog.text.count("is too slow: it misses events") == 1
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "shoal-observer":
            thread.join(20)
    assert events.MAX_QUEUED <= len(late) <= events.MAX_QUEUED + 1


def test_a_thread_starts_with_the_first_event_and_ends_when_the_observers_are_closed():
    observers = Observers([lambda event: None])
    assert "shoal-observer" not in [thread.name for thread in threading.enumerate()]
    observers.emit(LOST)
    assert "shoal-observer" in [thread.name for thread in threading.enumerate()]
    close(observers)
    assert "shoal-observer" not in [thread.name for thread in threading.enumerate()]
    observers.emit(LOST)  # too late, and no mistake


def test_the_log_has_a_line_for_an_event_and_formats_only_what_it_writes(caplog: pytest.LogCaptureFixture):
    explained: list[str] = []

    def explain() -> str:
        explained.append("explained")
        return "12 ms a step"

    route = RouteChosen("m", Span(0, 4), (("a", Span(0, 4)),), 0.012, explain)
    with caplog.at_level(logging.WARNING, "shoal.events"):
        LogObserver()(route)
        LogObserver()(LOST)
    assert caplog.messages == ["12D3peer is silent; looking for another server"]
    assert not explained
    with caplog.at_level(logging.INFO, "shoal.events"):
        LogObserver()(route)
    assert caplog.messages[-1] == "blocks 0:4: 12 ms a step"
