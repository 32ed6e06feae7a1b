"""Whether a server is alive: when a client pings it, and when it takes it for lost or stuck.

A server answers a `Ping` at any time, also while it computes. So a silent server is pinged, and a server that does not
answer a ping within about a second is lost. How long an answer to a request may take is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PING_SECONDS = 0.5
"""A server that was silent for so long is pinged: a lost server is noticed in about two seconds, at little traffic."""
MIN_PING_SECONDS = 0.1
"""The shortest silence after which a server is pinged, however fast it usually answers."""
PING_FACTOR = 3
"""A server that is silent for this multiple of an answer's usual seconds is pinged, even before `PING_SECONDS`."""
STUCK_SECONDS = 30.0
"""A server is stuck if it works and computes nothing for so long. One without room says after 20 s that it is busy."""
STUCK_FACTOR = 20
"""How many times the usual seconds of an answer are added to `STUCK_SECONDS`."""


@dataclass(frozen=True)
class Liveness:
    """What a client knows of a server's life over one stream. Times are in seconds of the caller's clock.

    `awaited_since` is when it began to await what it awaits now, and `usual_seconds` how long that usually takes; None
    if it awaits nothing. `pinged_at` is the time of a ping that was not answered yet. If `ping_is_last`, nothing was
    sent after it. `working_since` is since when the server works without computing a pass: its count of passes has been
    `num_passes` since then.
    """

    awaited_since: float
    usual_seconds: float | None = None
    pinged_at: float | None = None
    ping_is_last: bool = False
    working_since: float | None = None
    num_passes: int = 0

    def after_sending(self, *, is_ping: bool, now: float) -> Liveness:
        """A message is sent: a ping, or another."""
        return replace(self, pinged_at=now if is_ping else self.pinged_at, ping_is_last=is_ping)

    def after_request(self, usual_seconds: float | None, *, now: float) -> Liveness:
        """Other answers are awaited from now on, which usually take so long; None for none."""
        return replace(self, usual_seconds=usual_seconds, awaited_since=now, ping_is_last=False)

    def after_pong(self, *, working: bool, num_passes: int, now: float) -> Liveness:
        """The ping was answered by a server that is `working` on a request, or not, and has computed `num_passes`."""
        stands_still = working and num_passes == self.num_passes and self.working_since is not None
        return replace(
            self,
            pinged_at=None,
            working_since=self.working_since if stands_still else now,
            num_passes=num_passes,
        )

    def after_message(self) -> Liveness:
        """Another message came than a pong."""
        return replace(self, working_since=None)

    @property
    def ping_interval(self) -> float:
        """The seconds of silence after which the server is pinged: fewer while a fast answer is awaited."""
        if self.usual_seconds is None:
            return PING_SECONDS
        return min(PING_SECONDS, max(MIN_PING_SECONDS, PING_FACTOR * self.usual_seconds))

    def ping_due_in(self, *, heard_at: float, now: float) -> float:
        """Seconds until the server is to be pinged, if this stream brings nothing after `heard_at`."""
        return heard_at + self.ping_interval - now

    def lost_in(self, *, heard_at: float, patience: float, now: float) -> float:
        """Seconds until a server that was pinged is lost, if nothing comes after `heard_at` on any of its streams.

        It has `patience` seconds from the ping, from the last request and from its last sign of life.
        """
        assert self.pinged_at is not None
        return max(self.pinged_at, self.awaited_since, heard_at) + patience - now

    def stuck_seconds(self, now: float) -> float | None:
        """For how many seconds a stuck server has computed nothing; None if it is not stuck."""
        if self.working_since is None:
            return None
        seconds = now - self.working_since
        return seconds if seconds > STUCK_SECONDS + STUCK_FACTOR * (self.usual_seconds or 0.0) else None
