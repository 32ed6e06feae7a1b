"""How many bytes a server lets its peers use to measure their networks."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_SECONDS = 600.0
"""The time in which the bytes below may be used."""
PEER_BYTES = 24 << 20
"""Bytes to and from one peer within the window: enough for two measurements in both directions."""
ALL_BYTES = 64 << 20
"""Bytes to and from all peers within the window."""
MIN_CHARGE = 256 << 10
"""A transfer counts as this many bytes at least: it costs time too."""


@dataclass(frozen=True)
class TransferBudget:
    """The transfers of the last `WINDOW_SECONDS`: when each was granted, to which peer, and its bytes."""

    granted: tuple[tuple[float, str, int], ...] = ()

    def grant(self, peer: str, num_bytes: int, *, now: float) -> TransferBudget | None:
        """With one more transfer of `num_bytes` bytes; `None` if that would be too much."""
        recent = tuple(each for each in self.granted if each[0] > now - WINDOW_SECONDS)
        num_bytes = max(num_bytes, MIN_CHARGE)
        of_peer = sum(spent for _, each, spent in recent if each == peer)
        if of_peer + num_bytes > PEER_BYTES or sum(spent for *_, spent in recent) + num_bytes > ALL_BYTES:
            return None
        return TransferBudget((*recent, (now, peer, num_bytes)))
