"""What servers announce: the model, and themselves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shoal.spans import Span


@dataclass(frozen=True)
class ModelInfo:
    """A model of the swarm, as its servers announce it. `key` identifies it (`shoal.model.weights.fingerprint`)."""

    key: str
    name: str
    family: str
    num_blocks: int


class ServerState(StrEnum):
    """The phase of a server's life."""

    JOINING = "joining"  # it is loading its blocks: other joining servers count them, clients do not route to it
    ONLINE = "online"
    UNREACHABLE = "unreachable"  # it would serve its blocks, but others cannot dial it: it counts for no block
    LEAVING = "leaving"  # it is shutting down: clients do not wait for it

    @property
    def counts(self) -> bool:
        """Whether its blocks count as held, now or soon."""
        return self in (ServerState.JOINING, ServerState.ONLINE)


MAX_NEIGHBORS = 16
"""The number of servers to which a server announces its round-trip time. It keeps records small."""


MAX_HOSTED_ADAPTERS = 16
"""The number of hosted adapters that a server announces. It keeps records small."""


MAX_SPEED_POINTS = 8
"""The number of span lengths for which a server announces its speed. It keeps records small."""


MAX_SPANS_ON_DISK = 8
"""The number of spans on disk that a server announces. It keeps records small."""


def short(peer: str) -> str:
    """The last 12 characters of a peer id. They tell peers apart where space is limited, as in records."""
    return peer[-12:]


def block_speed_at(block_speeds: Sequence[tuple[int, float]], num_blocks: int) -> float:
    """The speed with a span of `num_blocks` blocks: linear between the lengths that are known (`Capacity`)."""
    index = bisect_right(block_speeds, num_blocks, key=lambda pair: pair[0])
    if index == 0:
        return block_speeds[0][1]
    if index == len(block_speeds):
        return block_speeds[-1][1]
    (short, fast), (long, slow) = block_speeds[index - 1 : index + 1]
    return fast + (slow - fast) * (num_blocks - short) / (long - short)


@dataclass(frozen=True)
class Capacity:
    """What a server can hold and compute, wherever its span is. It is what others need to know to place it.

    `block_speeds` are pairs of a span's length and the server's saturated speed with such a span: in decoded tokens per
    second of one block, when all its blocks are busy with as large batches as its memory has cache for. A longer span
    leaves less cache. The lengths grow from pair to pair. `network_speed` is how many tokens per second its network
    carries in the slower direction, `None` if it was not measured. `load_seconds` and `disk_seconds` are what a block
    takes to load that is not on its disk, and one that is; `on_disk` are the blocks on its disk.
    """

    max_blocks: int
    block_speeds: tuple[tuple[int, float], ...]
    network_speed: float | None
    load_seconds: float
    disk_seconds: float
    on_disk: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ServerInfo:
    """What a server announces about itself, in a signed and expiring record for each of its blocks.

    `decode_speed` (one token at a time) and `prefill_speed` (long inputs) are in tokens per second through its whole
    span; both are None until the server has measured them. `fingerprint` names the exact weights before quantization
    (`shoal.model.weights.fingerprint`). `encodings` are those in which it takes and sends tensors, in addition to
    raw (`shoal.tensors`). `cache_tokens_left` is in tokens. `queue_length` counts the waiting steps and passes. A
    server with a `head` also computes the final norm and the output projection after the last block. A server without
    `training` computes only sessions. `adapters` are the names of the adapters that it hosts for all clients
    (`shoal.model.peft.peft_folder`). `round_trips` are round-trip times in seconds to servers that may precede or
    follow it in a route, by the `short` form of their peer ids. `unreached` are those of them that did not answer it:
    clients carry what goes from one to the other.

    `capacity` is what the server has measured; one that loads for the first time announces that of most others. A
    `pinned` server does not move to other blocks. An online one that claims other blocks, or that loads them while it
    serves its span, says which: `wants`. `zone` is a coarse place whose servers may fail together. `up_since` and
    `ready_at` are Unix times: since when the server has been in the swarm, and when one that is loading expects to
    serve what it loads; `None` if unknown, or if it only claims these blocks. `reason` says why it took its blocks.
    `attention` says how it computes attention and why not otherwise: empty if there is nothing to say.
    `protocol` is the version that it speaks: 8 is that of records that do not say it.
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
    unreached: tuple[str, ...] = ()
    capacity: Capacity | None = None
    pinned: bool = False
    wants: Span | None = None
    zone: str = ""
    up_since: float | None = None
    ready_at: float | None = None
    reason: str = ""
    attention: str = ""
    protocol: int = 8

    def reaches(self, other: ServerInfo) -> bool:
        """Whether it can push to another server, as far as it says."""
        return short(other.peer) not in self.unreached

    @property
    def is_relayed(self) -> bool:
        """Whether it has relays, which it has if most peers cannot dial it: its other addresses are for its own LAN."""
        return any("/p2p-circuit" in address for address in self.addresses)
