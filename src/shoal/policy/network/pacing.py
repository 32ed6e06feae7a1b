"""When the next bytes may be sent, so that no more than a limit of bytes per second are."""

from __future__ import annotations


class Pacer:
    """Keeps to `rate` bytes per second, with bursts of a second. `now` is any clock's time in seconds."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = float("-inf")

    def delay(self, *, now: float) -> float:
        """The seconds to wait before anything more may be sent."""
        return max(self._free_at - now, 0.0)

    def reserve(self, num_bytes: int, *, now: float) -> float:
        """Count bytes that will be sent; returns the seconds to wait before sending them."""
        self._free_at = max(self._free_at, now - 1.0)
        wait = max(self._free_at - now, 0.0)
        self._free_at += num_bytes / self._rate
        return wait
