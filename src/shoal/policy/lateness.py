"""When a server is late, so that others are asked too, and what follows for a server that was overtaken.

A server can answer every ping, say that it works, and give nothing. A client that believes it waits for minutes. So a
client waits for a step as long as such a step may take, and then asks another server too. The first answer counts. So
it is with the steps of sessions, and with single passes.
"""

from __future__ import annotations

from dataclasses import dataclass

LATE_SECONDS = 3.0
"""A step that takes longer may be late: honest servers take as long when a large prompt of another client is in front,
and then nothing is lost but the work of the second server. A user notices a longer pause."""
UNPROVEN_LATE_SECONDS = 1.5
"""The same for a server that has never computed a step for this client: it may be one that never does."""
LATE_FACTOR = 5.0
"""How many times its usual seconds a step may take before it is late: a prompt, or a slow server."""
MOST_TRIED = 32
"""How many servers, or routes of several, are asked for one late step at most. One more is asked if all before are late
themselves, or have failed."""
PATIENT_AFTER = 2
"""A server that was late so often in a session, and still the first to answer, is left. If there is no better one, it
has twice the time at each later time: the second servers would do all the work of a busy swarm twice."""
MOST_DOUBLINGS = 6
OPENING_LATE_SECONDS = 1.0
"""A server that takes longer to accept a stream, or to open a session, is late: each usually takes a round trip or two,
and nothing is computed for it."""
OPENING_LATE_ROUND_TRIPS = 6.0
"""How many round trips it may take, where these are long."""
WARY_SECONDS = 300.0
"""After a server that has never computed for it was late, a client rather takes servers that have, for so long."""
OVERTAKEN_SECONDS = 300.0
"""For how long a client remembers that a server was overtaken."""


def late_after(usual_seconds: float, *, num_late: int = 0, is_proven: bool = True) -> float:
    """The seconds after which a step is late that usually takes `usual_seconds`.

    Its server was late `num_late` times before in this session, and answered first. It `is_proven` if it has computed
    steps for this client before.
    """
    growth = 1 << min(max(0, num_late + 1 - PATIENT_AFTER), MOST_DOUBLINGS)
    least = LATE_SECONDS if is_proven else UNPROVEN_LATE_SECONDS
    return max(least, LATE_FACTOR * usual_seconds) * growth


@dataclass(frozen=True)
class LateButFirst:
    """How often a server was late with a single pass, lately, and still the first to answer; and when it was last."""

    num_times: int
    at: float


def after_late_but_first(known: LateButFirst | None, *, since: float, now: float) -> LateButFirst:
    """What is remembered of a server that was late once more, with a pass that it was asked for at the time `since`.

    `known` is None before the first time. Passes that are on their way together are late together: that is once.
    """
    if known is None or now - known.at > OVERTAKEN_SECONDS:
        return LateButFirst(1, now)
    return known if since < known.at else LateButFirst(known.num_times + 1, now)


def pass_late_at(
    asked_at: float, usual_seconds: float, *, answered_at: float, known: LateButFirst | None, is_proven: bool
) -> float:
    """From when on a single pass is late, whose server has had all of the inputs since `asked_at`.

    A client has many passes on their way to one server, which computes them one after another. So the server's time
    begins again when it has answered any of them: it did so last at the time `answered_at`.
    """
    since = max(asked_at, answered_at)
    num_late = known.num_times if known is not None and since - known.at <= OVERTAKEN_SECONDS else 0
    return since + late_after(usual_seconds, num_late=num_late, is_proven=is_proven)


def opening_late_after(round_trip: float | None) -> float:
    """The seconds after which a server is late to open what it was asked to. `round_trip` is None if it is unknown."""
    return max(OPENING_LATE_SECONDS, OPENING_LATE_ROUND_TRIPS * (round_trip or 0.0))


def result_late_at(asked_at: float, round_trip: float | None) -> float:
    """From when on a result is late that a server has computed before, if it has failed or was overtaken since then.

    It was asked for at the time `asked_at`. There is nothing to compute, so it has only as long as to open a session.
    """
    return asked_at + opening_late_after(round_trip)


@dataclass(frozen=True)
class Awaited:
    """The oldest step that a server has been asked for, and has the inputs of: since when, and what it usually takes.

    `key` is the step's epoch and position. The server `is_proven` if it has computed steps for this client before.
    """

    key: tuple[int, int]
    since: float
    usual_seconds: float
    is_proven: bool = True

    def late_at(self, *, num_late: int = 0) -> float:
        """From when on the step is late."""
        return self.since + late_after(self.usual_seconds, num_late=num_late, is_proven=self.is_proven)


@dataclass(frozen=True)
class Overtaken:
    """How often a second server was faster than this one, lately, and when it was last."""

    num_times: int
    at: float

    @property
    def is_blamed(self) -> bool:
        """Whether other servers are preferred to it: once is an accident."""
        return self.num_times > 1


def after_overtaken(known: Overtaken | None, *, now: float) -> Overtaken:
    """What is remembered of a server that was overtaken once more; `known` is None before the first time."""
    if known is None or now - known.at > OVERTAKEN_SECONDS:
        return Overtaken(1, now)
    return Overtaken(known.num_times + 1, now)
