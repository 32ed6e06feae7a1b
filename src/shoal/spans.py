"""Spans of blocks, and what a server says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, order=True)
class Span:
    """The blocks `[start, end)` of a model; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a span of blocks: {self.start}:{self.end}")

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, block: int | Span) -> bool:
        """Whether a block, or every block of another span, is in this one."""
        if isinstance(block, Span):
            return self.start <= block.start and block.end <= self.end
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read `"4:8"`.

        Raises `ValueError` for anything else.
        """
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if match is None:
            raise ValueError(f"not a span of blocks: {text!r} (write it as 0:8)")
        return cls(int(match[1]), int(match[2]))


class ServerState(StrEnum):
    """Where a server is in its life."""

    JOINING = "joining"  # loading its blocks: counted by those who join after it, not routed to
    ONLINE = "online"
    LEAVING = "leaving"  # said goodbye: nobody waits for it


MAX_NEIGHBOURS = 16
"""Servers to which one announces its distance."""


MAX_HOSTED = 16
"""Adapters that one announces to host."""


def short(peer: str) -> str:
    """The end of a peer id: enough to tell peers apart, in a record that has to be small."""
    return peer[-12:]


@dataclass(frozen=True)
class ServerInfo:
    """What a server announces of itself: a signed, expiring record for every block that it holds.

    Speeds are in tokens per second through the whole of its span: `decode_speed` one token at a time, `prefill_speed`
    for long inputs; both are None until the server has measured them. `fingerprint` names the exact weights
    (`shoal.model.checkpoint`), before any quantization.
    `encodings` are the ways beside raw in which it takes and sends tensors (`shoal.protocol`).
    `queue_length` counts the steps and passes that wait. With a `head` it computes the final norm and the output
    projection too, after the last block; without `training` it computes sessions only. `adapters` are the names of
    those that it hosts for everybody (`shoal.model.peft_folder`). `round_trips` are the seconds to other servers and
    back, by the `short` form of their peer ids: to those that may come before or after it in a route.
    """

    peer: str
    span: Span
    state: ServerState
    fingerprint: str
    decode_speed: float | None
    prefill_speed: float | None
    cache_tokens_left: int
    dtype: str
    quantization: str
    version: str
    name: str = ""
    addresses: tuple[str, ...] = ()
    encodings: tuple[str, ...] = ()
    queue_length: int = 0
    head: bool = False
    training: bool = True
    adapters: tuple[str, ...] = ()
    round_trips: tuple[tuple[str, float], ...] = ()

    @property
    def is_relayed(self) -> bool:
        """Whether it can be reached through relays only."""
        return bool(self.addresses) and all("/p2p-circuit" in address for address in self.addresses)
