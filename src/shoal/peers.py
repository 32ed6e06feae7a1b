"""What peers say of themselves: the model, and what a server of it announces."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shoal.spans import Span


@dataclass(frozen=True)
class ModelInfo:
    """One model of the swarm, as its servers announce it."""

    key: str
    name: str
    family: str
    num_blocks: int


class ServerState(StrEnum):
    """Where a server is in its life."""

    JOINING = "joining"  # loading its blocks: counted by those who join after it, not routed to
    ONLINE = "online"
    LEAVING = "leaving"  # said goodbye: nobody waits for it


MAX_NEIGHBORS = 16
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
    (`shoal.model.weights.checkpoint`), before any quantization.
    `encodings` are the ways beside raw in which it takes and sends tensors (`shoal.protocol`).
    `queue_length` counts the steps and passes that wait. With a `head` it computes the final norm and the output
    projection too, after the last block; without `training` it computes sessions only. `adapters` are the names of
    those that it hosts for everybody (`shoal.model.peft.peft_folder`). `round_trips` are the seconds to other servers
    and back, by the `short` form of their peer ids: to those that may come before or after it in a route.
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
