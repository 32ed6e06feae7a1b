"""How a link delays and throttles bytes. Pure: the time is an argument, nothing here waits or sends."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

SLICE_SECONDS = 0.001
"""Connections that share a link take turns after about this much of its time."""
MIN_SLICE_BYTES = 2 << 10
"""A slice has at least this size, or the proxy would spend its time on single packets of a slow link."""
MAX_SLICE_BYTES = 256 << 10
"""A slice has at most this size: it is what a socket's buffer holds."""


@dataclass(frozen=True)
class Link:
    """One direction of a link. The default changes nothing.

    `delay_seconds` is the delay one way. A random time up to `jitter_seconds` is added to it; the data of one
    connection stays in order, as with TCP. All connections share `bytes_per_second`; None is no limit. The queue in
    front of the link holds at most `queue_seconds` of its time: a sender that exceeds it has to wait.

    Raises `ValueError` for negative times and for a speed that is not positive.
    """

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    bytes_per_second: float | None = None
    queue_seconds: float = 0.01

    def __post_init__(self) -> None:
        if min(self.delay_seconds, self.jitter_seconds, self.queue_seconds) < 0:
            raise ValueError(f"a link with negative times: {self}")
        if self.bytes_per_second is not None and self.bytes_per_second <= 0:
            raise ValueError(f"a link that carries {self.bytes_per_second} bytes per second: black_hole() carries none")

    @property
    def is_transparent(self) -> bool:
        """Whether data arrives at once."""
        return self.delay_seconds == 0 and self.jitter_seconds == 0 and self.bytes_per_second is None

    @property
    def slice_bytes(self) -> int:
        """The most bytes of one connection that are sent in one piece."""
        if self.bytes_per_second is None:
            return MAX_SLICE_BYTES
        return max(MIN_SLICE_BYTES, min(MAX_SLICE_BYTES, int(self.bytes_per_second * SLICE_SECONDS)))

    def to_json(self) -> dict[str, float | None]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, float | None]) -> Self:
        """The reverse of `to_json`."""
        return cls(**fields)  # type: ignore[arg-type]


class LinkDirection:
    """A link in use. The connections that cross it share one object, which knows until when the link is busy."""

    def __init__(self, link: Link, *, seed: int = 0) -> None:
        self.link = link
        self.num_bytes = 0
        self._free_at = float("-inf")
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret

    def set_link(self, link: Link) -> None:
        """Use another link from now on. What is in transit arrives at its old time."""
        self.link = link
        self._free_at = float("-inf")

    def send(self, num_bytes: int, now: float) -> float:
        """Send bytes over the link. Returns the time when the last of them arrives."""
        link = self.link
        self.num_bytes += num_bytes
        self._free_at = max(now, self._free_at)
        if link.bytes_per_second is not None:
            self._free_at += num_bytes / link.bytes_per_second
        jitter = self._random.uniform(0, link.jitter_seconds) if link.jitter_seconds else 0.0
        return self._free_at + link.delay_seconds + jitter

    def queue_free_at(self) -> float:
        """The time from which the queue has room for more; it may be in the past."""
        return self._free_at - self.link.queue_seconds
