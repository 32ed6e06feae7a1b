"""Which servers a client keeps away from after a failure, and for how long.

A server that failed is deprioritized for a while: others that hold its blocks are preferred. For a much shorter time it
is blocked: it is not asked at all, even if no other server holds its blocks. Both times double with every failure in a
row. A success forgets the record.
"""

from __future__ import annotations

from dataclasses import dataclass

DEPRIORITIZE_SECONDS = 15.0
"""How long a server is deprioritized after its first failure: long enough for a restart."""
BLOCK_SECONDS = 0.25
"""How long a server is blocked after its first failure, so that the only server of a block is not asked in a loop."""
LONGEST_SECONDS = 300.0
"""The limit of the first after many failures: as long as the announcement of a vanished server may be valid."""
LONGEST_BLOCK_SECONDS = 8.0
"""The limit of the second: a client that waits for the only server of a block asks it this often."""
RECORD_SECONDS = 60.0
"""The usual life of an announcement. A server that is still announced so long after its failure has come back since."""
MOST_DOUBLINGS = 20
"""The limit of the exponent: `LONGEST_SECONDS` is reached long before."""


@dataclass(frozen=True)
class HealthRecord:
    """A server that failed `num_failures` times in a row: why and when it failed last, and what follows until when."""

    num_failures: int
    reason: str
    failed_at: float
    deprioritized_until: float
    blocked_until: float


def after_failure(record: HealthRecord | None, reason: str, *, now: float, since: float) -> HealthRecord:
    """The record after a failure of a request that began at the time `since`; `record` is None for the first.

    Many requests may be in flight when a server dies. A request that began before the last failure was known is part of
    that failure, and the record stays as it is.
    """
    if record is not None and record.num_failures and since < record.failed_at:
        return record
    num_failures = 1 if record is None else record.num_failures + 1
    growth = 2 ** min(num_failures - 1, MOST_DOUBLINGS)
    return HealthRecord(
        num_failures,
        reason,
        failed_at=now,
        deprioritized_until=now + min(DEPRIORITIZE_SECONDS * growth, LONGEST_SECONDS),
        blocked_until=now + min(BLOCK_SECONDS * growth, LONGEST_BLOCK_SECONDS),
    )


def after_busy(record: HealthRecord | None, reason: str, *, now: float, seconds: float) -> HealthRecord:
    """The record after a server said that it has room again in `seconds`, which is no failure."""
    return HealthRecord(_num_failures(record), reason, now, now + seconds, now + seconds)


def after_misrouted(record: HealthRecord | None, reason: str, *, now: float) -> HealthRecord:
    """The record after a server could not do what it was asked: it may do other things, so it is only deprioritized."""
    return HealthRecord(_num_failures(record), reason, now, now + DEPRIORITIZE_SECONDS, now)


def after_late(record: HealthRecord | None, reason: str, *, now: float, num_before: int) -> HealthRecord:
    """The record after a server was late again, and has been deprioritized for that `num_before` times."""
    seconds = min(DEPRIORITIZE_SECONDS * 2 ** min(num_before, MOST_DOUBLINGS), LONGEST_SECONDS)
    return HealthRecord(_num_failures(record), reason, now, now + seconds, now)


def is_deprioritized(record: HealthRecord | None, now: float) -> bool:
    """Whether other servers are preferred to this one."""
    return record is not None and now < record.deprioritized_until


def is_blocked(record: HealthRecord | None, now: float) -> bool:
    """Whether this server is not to be asked at all."""
    return record is not None and now < record.blocked_until


def is_lost(record: HealthRecord | None, now: float) -> bool:
    """Whether a server has failed and nothing has been heard of it since, as far as one can know."""
    return record is not None and record.num_failures > 0 and now - record.failed_at < RECORD_SECONDS


def _num_failures(record: HealthRecord | None) -> int:
    return 0 if record is None else record.num_failures
