"""How fast a server's network is, from what it measured and what it saw, and when it measures again.

Neighbors help to measure: each takes some bytes, and sends some. No neighbor can make the network look faster than it
is, because what it answers proves that it has the bytes, and each may be the slower end. So the fastest of them counts.
Large frames of sessions show something too. When they contradict the estimate, the server measures again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["up", "down"]

COPIES_SENT = 2
"""A server sends what it computes twice: to the next server, and to the client, who may need it for a replay."""
FACTOR = 2.0
"""Traffic contradicts the estimate if it is this many times slower or faster."""
NUM_SLOWER = 3
"""The number of bulks in a row that have to be slower: one of them may have met a slow peer."""
FIRST_WAIT, LONGEST_WAIT = 60.0, 3600.0
"""Seconds from one measurement to the next, at least, as long as reality keeps disagreeing: doubled with each."""
REFRESH_SECONDS = 6 * 3600.0
"""The age at which an estimate that nothing contradicts is made again."""

BUFFER_BYTES = 8 << 20
"""What the buffers between two peers may hold: bytes that seem to be sent, or that came before they were read."""
GAP_SECONDS = 0.1
"""Large frames that follow each other within this time are one bulk."""


@dataclass(frozen=True)
class Seen:
    """What a bulk of large frames says of the network, in bytes per second: it is at least as fast as `at_least`.

    If the other side is no slower, it is at most as fast as `at_most`.
    """

    at_least: float
    at_most: float


@dataclass(frozen=True)
class Bulk:
    """Large frames in one direction that overlap or follow each other closely; `num_open` of them are under way."""

    num_bytes: int = 0
    seconds: float = 0.0
    num_open: int = 0
    changed_at: float = float("-inf")

    def opened(self, *, now: float) -> Bulk:
        """One more frame is under way."""
        if not self.num_open and now - self.changed_at > GAP_SECONDS:
            return Bulk(num_open=1, changed_at=now)
        return replace(self._until(now), num_open=self.num_open + 1)

    def closed(self, num_bytes: int, *, now: float) -> Bulk:
        """A frame of `num_bytes` bytes is complete; 0 if it was given up."""
        bulk = self._until(now)
        return replace(bulk, num_open=self.num_open - 1, num_bytes=self.num_bytes + num_bytes)

    def _until(self, now: float) -> Bulk:
        seconds = self.seconds + (now - self.changed_at if self.num_open else 0.0)
        return replace(self, seconds=seconds, changed_at=now)

    @property
    def seen(self) -> Seen | None:
        """What it says, if it is much larger than the buffers on the way."""
        if self.num_bytes < 2 * BUFFER_BYTES or self.seconds <= 0:
            return None
        return Seen((self.num_bytes - BUFFER_BYTES) / self.seconds, self.num_bytes / self.seconds)


@dataclass(frozen=True)
class NetworkEstimate:
    """Bytes per second `up` and `down`, `None` while unknown, and the time from which it is `due` to be measured again.

    `proven_up` and `proven_down` are what traffic has shown since. `num_slower` counts bulks in a row that were slower.
    `wait` is how long the next measurement waits at least after the last, which was at `measured_at`.
    """

    up: float | None = None
    down: float | None = None
    due: float = 0.0
    proven_up: float = 0.0
    proven_down: float = 0.0
    num_slower: int = 0
    wait: float = FIRST_WAIT
    measured_at: float = float("-inf")

    def after_measuring(self, found: Sequence[tuple[float | None, float | None]], *, now: float) -> NetworkEstimate:
        """With the rates to and from several peers. A direction that none helped to measure stays as it was.

        Traffic that was faster still counts, if it was not what contradicted the estimate: the peers may be slow.
        """
        ups = [rate for rate, _ in found if rate is not None]
        downs = [rate for _, rate in found if rate is not None]
        longer = min(2 * self.wait, LONGEST_WAIT)
        if not ups and not downs:
            return replace(self, due=now + self.wait, wait=longer, measured_at=now)
        is_slower = self.num_slower >= NUM_SLOWER
        is_old = REFRESH_SECONDS <= now - self.measured_at < math.inf
        proven_up, proven_down = (0.0, 0.0) if is_slower or is_old else (self.proven_up, self.proven_down)
        up = max(*ups, proven_up) if ups else self.up
        down = max(*downs, proven_down) if downs else self.down
        confirmed = _agree(self.up, up) and _agree(self.down, down)
        return NetworkEstimate(
            up,
            down,
            now + REFRESH_SECONDS,
            proven_up,
            proven_down,
            wait=longer if confirmed and is_slower else FIRST_WAIT,
            measured_at=now,
        )

    def after_traffic(self, direction: Direction, seen: Seen, *, now: float) -> NetworkEstimate:
        """With what a bulk of sessions' frames has shown."""
        rate = self.up if direction == "up" else self.down
        if rate is None or seen.at_least > rate:
            surprising = rate is not None and seen.at_least > FACTOR * rate
            due = self._soon(now) if surprising else self.due
            if direction == "up":
                return replace(self, up=seen.at_least, proven_up=seen.at_least, num_slower=0, due=due)
            return replace(self, down=seen.at_least, proven_down=seen.at_least, num_slower=0, due=due)
        if seen.at_most * FACTOR > rate:
            return replace(self, num_slower=0)
        num_slower = self.num_slower + 1
        return replace(self, num_slower=num_slower, due=self.due if num_slower < NUM_SLOWER else self._soon(now))

    def _soon(self, now: float) -> float:
        return min(self.due, max(now, self.measured_at + self.wait))

    def tokens_per_second(self, token_bytes: int) -> float | None:
        """How many tokens of `token_bytes` bytes the slower direction carries; `None` while one of them is unknown."""
        if self.up is None or self.down is None:
            return None
        return min(self.up / COPIES_SENT, self.down) / token_bytes


def _agree(one: float | None, other: float | None) -> bool:
    return one is None or other is None or one / FACTOR < other < one * FACTOR
