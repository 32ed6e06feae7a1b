"""What goes wrong and when: as a list of events, written by hand or drawn at random."""

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
    """What may be done to a server; each is a method of `ShapedServer`."""

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


@dataclass(frozen=True, order=True)
class Event:
    """Something that happens to a server, counted from 0, so many seconds after the beginning."""

    seconds: float
    server: int
    act: Act


class Swarm(Protocol):
    """What events happen to."""

    def do(self, server: int, act: Act) -> None:
        """Begin it; do not wait for what comes of it."""


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
    """Failures of servers with these spans, at random, such that every block always has a server that is well.

    A failure comes every `every_seconds` on average, is one of `acts`, and is cured after about `down_seconds`, at the
    end at the latest; `settle_seconds` later the server counts as well again. One that nobody can spare is left alone.
    """
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    held = [span if isinstance(span, Span) else Span.parse(span) for span in spans]
    well_at = [0.0] * len(held)
    events: list[Event] = []
    now = 0.0
    while (now := now + chance.expovariate(1 / every_seconds)) < seconds:
        well = [index for index, at in enumerate(well_at) if at <= now]
        spared = [index for index in well if is_spared(index, well, held)]
        if not spared:
            continue
        server, act = chance.choice(spared), chance.choice(acts)
        cured = min(seconds, now + down_seconds * chance.uniform(0.5, 1.5))
        events += [Event(now, server, act), Event(cured, server, CURES[act])]
        well_at[server] = cured + settle_seconds
    return tuple(sorted(events))


def is_spared(server: int, well: Sequence[int], held: Sequence[Span]) -> bool:
    """Whether the others that are well hold all that this one holds."""
    return all(any(block in held[other] for other in well if other != server) for block in held[server])


def play(swarm: Swarm, events: Sequence[Event], sleep: Callable[[float], bool]) -> None:
    """Let the events happen; `sleep` waits until so many seconds after the beginning, and says whether to go on."""
    for event in sorted(events):
        if not sleep(event.seconds):
            return
        swarm.do(event.server, event.act)


@contextlib.contextmanager
def churning(swarm: Swarm, events: Sequence[Event]) -> Iterator[None]:
    """Let the events happen, on a thread of their own, until the context is left. Raises what they raised."""
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
