"""Failures of servers, as a list of timed events that is written by hand or drawn at random."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from shoal.spans import Span


class Act(StrEnum):
    """What can be done to a server. Each act is a method of `ShapedServer`."""

    KILL = "kill"
    STOP = "stop"
    RESTART = "restart"
    HANG = "hang"
    RESUME = "resume"
    CUT = "cut"
    BLACK_HOLE = "black_hole"
    HEAL = "heal"


CURES = {
    Act.KILL: Act.RESTART,
    Act.STOP: Act.RESTART,
    Act.HANG: Act.RESUME,
    Act.CUT: Act.HEAL,
    Act.BLACK_HOLE: Act.HEAL,
}
"""The act that undoes each failure."""


@dataclass(frozen=True, order=True)
class Event:
    """An act on a server, which is counted from 0, this many seconds after the beginning."""

    seconds: float
    server: int
    act: Act


class Swarm(Protocol):
    """What `churning` needs of a swarm."""

    def do(self, server: int, act: Act) -> None:
        """Begin the act, and return without waiting for its effect."""


def random_churn(
    spans: Sequence[Span | str],
    *,
    seconds: float,
    every_seconds: float,
    down_seconds: float,
    settle_seconds: float,
    acts: Sequence[Act] = (Act.KILL, Act.STOP),
    seed: int = 0,
) -> tuple[Event, ...]:
    """Random failures of servers with these spans, such that every block always has a healthy server.

    A failure is one of `acts`; one comes every `every_seconds` on average, and is undone after about `down_seconds`,
    at the latest after `seconds`. The server counts as healthy again `settle_seconds` later. A server that is the only
    healthy one of some block does not fail. The same `seed` gives the same events.
    """
    generator = random.Random(seed)  # noqa: S311 - repeatable, not secret
    held = [span if isinstance(span, Span) else Span.parse(span) for span in spans]
    healthy_at = [0.0] * len(held)
    events: list[Event] = []
    now = 0.0
    while (now := now + generator.expovariate(1 / every_seconds)) < seconds:
        healthy = [index for index, at in enumerate(healthy_at) if at <= now]
        redundant = [index for index in healthy if is_redundant(index, healthy, held)]
        if not redundant:
            continue
        server, act = generator.choice(redundant), generator.choice(acts)
        cured = min(seconds, now + down_seconds * generator.uniform(0.5, 1.5))
        events += [Event(now, server, act), Event(cured, server, CURES[act])]
        healthy_at[server] = cured + settle_seconds
    return tuple(sorted(events))


def is_redundant(server: int, healthy: Sequence[int], held: Sequence[Span]) -> bool:
    """Whether the other healthy servers hold every block of this one."""
    return all(any(block in held[other] for other in healthy if other != server) for block in held[server])


def play(swarm: Swarm, events: Sequence[Event], sleep: Callable[[float], bool]) -> None:
    """Apply the events in the order of their times.

    `sleep` waits until this many seconds after the beginning, and returns whether to continue.
    """
    for event in sorted(events):
        if not sleep(event.seconds):
            return
        swarm.do(event.server, event.act)


@contextlib.contextmanager
def churning(swarm: Swarm, events: Sequence[Event]) -> Iterator[None]:
    """A context in which a thread applies the events. Leaving it stops them, and raises what an event raised."""
    began = time.monotonic()
    is_over = threading.Event()
    failures: list[BaseException] = []

    def sleep(seconds: float) -> bool:
        return not is_over.wait(max(0.0, began + seconds - time.monotonic()))

    def run() -> None:
        try:
            play(swarm, events, sleep)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="shoal-churn")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if failures:
        raise failures[0]
