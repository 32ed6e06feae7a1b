"""What a link does to bytes, in virtual time: nothing here waits, sends or looks at a clock."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

SLICE_SECONDS = 0.001
"""Connections that share a link take turns after about so much of its time."""
MIN_SLICE_BYTES = 2 << 10
MAX_SLICE_BYTES = 256 << 10


@dataclass(frozen=True)
class Link:
    """One direction of a link. The default changes nothing.

    `delay_seconds` is one way. `jitter_seconds` is the most that is added to it, at random; the order of what travels
    on one connection is kept, as TCP keeps it. `bytes_per_second` is shared by all connections; None is no limit. At
    most `queue_seconds` of its time are waiting in front of the link: whoever sends more has to wait himself.
    """

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    bytes_per_second: float | None = None
    queue_seconds: float = 0.01

    def __post_init__(self) -> None:
        if min(self.delay_seconds, self.jitter_seconds, self.queue_seconds) < 0:
            raise ValueError(f"a link of negative times: {self}")
        if self.bytes_per_second is not None and self.bytes_per_second <= 0:
            raise ValueError(f"a link that carries {self.bytes_per_second} bytes per second: black_hole() carries none")

    @property
    def is_transparent(self) -> bool:
        """Whether what is sent arrives at once."""
        return self.delay_seconds == 0 and self.jitter_seconds == 0 and self.bytes_per_second is None

    @property
    def slice_bytes(self) -> int:
        """How much of a connection's data goes onto the link in one piece."""
        if self.bytes_per_second is None:
            return MAX_SLICE_BYTES
        return max(MIN_SLICE_BYTES, min(MAX_SLICE_BYTES, int(self.bytes_per_second * SLICE_SECONDS)))

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, float | None]) -> Self:
        return cls(**fields)  # type: ignore[arg-type]


class LinkDirection:
    """A link in use: all connections that pass it ask the same lane, which knows until when it is busy."""

    def __init__(self, link: Link, *, seed: int = 0) -> None:
        self.link = link
        self.num_bytes = 0
        self._free_at = float("-inf")
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret

    def change(self, link: Link) -> None:
        """Be another link from now on. What is on its way arrives when it would have."""
        self.link = link
        self._free_at = float("-inf")

    def send(self, num_bytes: int, now: float) -> float:
        """Put bytes on the link; returns when the last of them is at its other end."""
        link = self.link
        self.num_bytes += num_bytes
        self._free_at = max(now, self._free_at)
        if link.bytes_per_second is not None:
            self._free_at += num_bytes / link.bytes_per_second
        jitter = self._random.uniform(0, link.jitter_seconds) if link.jitter_seconds else 0.0
        return self._free_at + link.delay_seconds + jitter

    def room_at(self) -> float:
        """When there is room in the queue for more. In the past: now."""
        return self._free_at - self.link.queue_seconds
