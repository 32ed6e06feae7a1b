"""The health of the servers that a client has used: which of them it keeps away from now."""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import Misrouted, PeerError, ServerBusy, ServerLate
from shoal.policy.health import (
    HealthRecord,
    after_busy,
    after_failure,
    after_late,
    after_misrouted,
    is_blocked,
    is_deprioritized,
    is_lost,
)
from shoal.policy.lateness import WARY_SECONDS, Overtaken, after_overtaken


class PeerHealth:
    """Keeps a record of each server that failed, until it succeeds. `shoal.policy.health` says what follows from it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, HealthRecord] = {}
        self._overtaken: dict[str, Overtaken] = {}
        self._wary_until = float("-inf")

    @property
    def is_wary(self) -> bool:
        """Whether a server that did nothing was met lately: there may be more of its kind."""
        return self._clock() < self._wary_until

    def deprioritized(self, peer: str) -> bool:
        """Whether other servers are preferred to this one now."""
        return is_deprioritized(self._records.get(peer), self._clock())

    def blocked(self, peer: str) -> bool:
        """Whether this server is not to be asked at all now."""
        return is_blocked(self._records.get(peer), self._clock())

    def lost(self, peer: str) -> bool:
        """Whether this server has failed, and has not answered or announced itself since."""
        return is_lost(self._records.get(peer), self._clock())

    def record_error(self, error: PeerError, *, since: float) -> None:
        """A request that began at the time `since` ended with this error."""
        match error:
            case ServerBusy():
                self.record_busy(error.peer, error.retry_after, str(error))
            case ServerLate():
                self.record_late(error.peer, str(error))
            case Misrouted():
                self.record_misrouted(error.peer, str(error))
            case _:
                self.record_failure(error.peer, str(error), since=since)

    def record_failure(self, peer: str, reason: str, *, since: float) -> None:
        """The server failed in a request that began at the time `since`."""
        self._records[peer] = after_failure(self._records.get(peer), reason, now=self._clock(), since=since)

    def record_busy(self, peer: str, seconds: float, reason: str) -> None:
        """The server said that it has room again in `seconds`."""
        self._records[peer] = after_busy(self._records.get(peer), reason, now=self._clock(), seconds=seconds)

    def record_misrouted(self, peer: str, reason: str) -> None:
        """The server could not do what it was asked; it may do other things."""
        self._records[peer] = after_misrouted(self._records.get(peer), reason, now=self._clock())

    def record_overtaken(self, peer: str, reason: str, *, is_proven: bool = True) -> None:
        """Another server was faster than this one, which was late. The second time, it is deprioritized.

        A server that is not proven, since it has never computed anything, is so the first time.
        """
        if not is_proven:
            self.record_late(peer, reason)
            return
        time = self._clock()
        self._overtaken[peer] = overtaken = after_overtaken(self._overtaken.get(peer), now=time)
        if overtaken.is_blamed:
            self._records[peer] = after_late(
                self._records.get(peer), reason, now=time, num_before=overtaken.num_times - 2
            )

    def record_late(self, peer: str, reason: str) -> None:
        """The server did not open what others have opened meanwhile. They are preferred, from the first time on."""
        time = self._clock()
        self._overtaken[peer] = overtaken = after_overtaken(self._overtaken.get(peer), now=time)
        self._records[peer] = after_late(self._records.get(peer), reason, now=time, num_before=overtaken.num_times - 1)
        self._wary_until = time + WARY_SECONDS

    def record_success(self, peer: str) -> None:
        """The server answered: its failures are forgotten."""
        self._records.pop(peer, None)

    def seconds_left(self) -> float:
        """Seconds until the first of the blocked servers may be asked again; 0 if none is blocked."""
        now = self._clock()
        return min((r.blocked_until - now for r in self._records.values() if is_blocked(r, now)), default=0.0)

    def reasons(self) -> list[str]:
        """Why each server is deprioritized, for an error message."""
        return [_reason(peer, record.reason) for peer, record in self._records.items() if self.deprioritized(peer)]


def _reason(peer: str, reason: str) -> str:
    """Why a server is deprioritized, with its name once and in short form."""
    return peer[-8:] + (reason.removeprefix(peer) if reason.startswith(f"{peer} ") else f": {reason}")
