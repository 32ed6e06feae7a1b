"""When a session asked, was admitted and was answered, and when it will ask again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Rhythm:
    """When a session was answered, and how long it was away before its last step, in seconds.

    It is away while its client and other servers work, whatever this server computes meanwhile. So its next step is
    expected after as long again.
    """

    answered_at: float | None = None
    away: float | None = None

    def after_arrival(self, now: float, *, decodes: bool) -> Rhythm:
        """With one more step, which is not answered yet. Only steps that decode tell when the next one comes."""
        return Rhythm(None, now - self.answered_at if decodes and self.answered_at is not None else None)

    def after_answer(self, now: float) -> Rhythm:
        """When the step is answered."""
        return replace(self, answered_at=now)

    @property
    def expected_at(self) -> float | None:
        """When the next step comes if the session keeps its pace; `None` while a step is here."""
        return None if self.answered_at is None or self.away is None else self.answered_at + self.away


@dataclass(frozen=True)
class SessionTimes:
    """What the engine knows of a session's past, in seconds.

    `used_at` is when it last asked for something or had something computed, `began_at` when it was admitted, and
    `since` when its client came.
    """

    used_at: float = float("-inf")
    began_at: float = float("-inf")
    since: float = float("-inf")
    rhythm: Rhythm = field(default_factory=Rhythm)

    @classmethod
    def opened(cls, now: float) -> SessionTimes:
        """The session is new."""
        return cls(now, now, now)

    def after_arrival(self, now: float, *, decodes: bool, since: float | None = None) -> SessionTimes:
        """A step came. If it decodes, the session will be away as long again before the next one.

        A session that is not admitted yet has its place by `since`.
        """
        rhythm = self.rhythm.after_arrival(now, decodes=decodes)
        return replace(self, used_at=now, since=self.since if since is None else since, rhythm=rhythm)

    def after_admission(self, now: float) -> SessionTimes:
        """The first of its tokens is computed from now on."""
        return replace(self, began_at=now)

    def after_pass(self, now: float, *, answered: bool) -> SessionTimes:
        """A part of its step was computed, or refused. With `answered`, it was the last part."""
        return replace(self, used_at=now, rhythm=self.rhythm.after_answer(now) if answered else self.rhythm)

    @property
    def expected_at(self) -> float | None:
        """When the next step is expected; `None` if the session does not decode, or a step of it is here."""
        return self.rhythm.expected_at
