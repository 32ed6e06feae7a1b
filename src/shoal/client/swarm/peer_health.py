"""Servers to keep away from for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEPRIORITIZE_SECONDS = 15.0
BLOCK_SECONDS = 0.25
LONGEST_SECONDS = 300.0


@dataclass(frozen=True)
class HealthRecord:
    """A server that failed `num_failures` times in a row, why, when, and until when it is avoided and barred."""

    num_failures: int
    reason: str
    failed_at: float
    deprioritized_until: float
    blocked_until: float


class PeerHealth:
    """Remembers who failed.

    A suspect is *avoided* for a while: whoever else holds its blocks is preferred. For a much shorter while it is
    *barred*: not asked even if it is the only one. Both double with every failure, and end when it answers.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, HealthRecord] = {}

    def deprioritized(self, peer: str) -> bool:
        """Whether to take another server if there is one."""
        record = self._records.get(peer)
        return record is not None and self._clock() < record.deprioritized_until

    def blocked(self, peer: str) -> bool:
        """Whether not to ask it at all."""
        record = self._records.get(peer)
        return record is not None and self._clock() < record.blocked_until

    def record_failure(self, peer: str, reason: str, *, since: float) -> None:
        """It failed in something that began at `since`.

        Many requests may be under way when a server goes. What began before its last failure was known is no other
        failure.
        """
        before = self._records.get(peer)
        if before is not None and before.num_failures and since < before.failed_at:
            return
        num_failures = 1 if before is None else before.num_failures + 1
        now, growth = self._clock(), 2 ** min(num_failures - 1, 20)
        self._records[peer] = HealthRecord(
            num_failures,
            reason,
            now,
            now + min(DEPRIORITIZE_SECONDS * growth, LONGEST_SECONDS),
            now + min(BLOCK_SECONDS * growth, LONGEST_SECONDS),
        )

    def record_busy(self, peer: str, seconds: float, reason: str) -> None:
        """It said when to come back, which is no failure."""
        self._set(peer, reason, deprioritized=seconds, blocked=seconds)

    def record_misrouted(self, peer: str, reason: str) -> None:
        """It could not do what was asked, and may well do other things: others are preferred for a while."""
        self._set(peer, reason, deprioritized=DEPRIORITIZE_SECONDS, blocked=0.0)

    def _set(self, peer: str, reason: str, *, deprioritized: float, blocked: float) -> None:
        before = self._records.get(peer)
        num_failures = 0 if before is None else before.num_failures
        now = self._clock()
        self._records[peer] = HealthRecord(num_failures, reason, now, now + deprioritized, now + blocked)

    def record_success(self, peer: str) -> None:
        """It answered."""
        self._records.pop(peer, None)

    def seconds_left(self) -> float:
        """How long until the first of those that are barred may be asked again."""
        now = self._clock()
        return min((s.blocked_until - now for s in self._records.values() if s.blocked_until > now), default=0.0)

    def reasons(self) -> list[str]:
        """Why each of them is avoided, for an error message."""
        return [_reason(peer, s.reason) for peer, s in self._records.items() if self.deprioritized(peer)]


def _reason(peer: str, reason: str) -> str:
    """Why a peer is avoided, naming it once and shortly."""
    return peer[-8:] + (reason.removeprefix(peer) if reason.startswith(f"{peer} ") else f": {reason}")
