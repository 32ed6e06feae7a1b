"""Whether a stream that a peer opens is taken, and which one gives way to it where there is no room.

Identities are free, and addresses are not. So room is shared between *networks* first, and between the peers of a
network then. A network is what one customer has: a /24 of IPv4, a /64 of IPv6. In a private network, where every
machine has an address of its own, it is the address.

    full, by network:     A A A A A A B B C      a stream of D comes: one of A, which has most, gives way
    within A, by peer:    p p p p q q            one of p, which has most: the one that was unused for longest

There is no limit for a network while there is room: all of an office behind one address may use a server that no other
network needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_STREAMS = 1024
"""Streams of all peers that are handled at the same time."""
MAX_STREAMS_PER_PEER = 64
"""Streams of one peer that are handled at the same time."""
KEPT_STREAMS = 256
"""Of `MAX_STREAMS`, those that only peers get that have been served before, however many strangers come."""
IDLE_SECONDS = 60.0
"""A stream over which nothing went for so long gives way to any other that has no room."""
MAX_SERVED = 4096
"""The peers of which it is remembered that they have been served."""
MAX_SERVED_OF_NETWORK = 64
"""Of these, those of one network: it must not push out the others."""


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that is handled: its peer, the peer's network, and the time at which it was last used.

    `is_served`: whether its peer has been served, over any stream.
    """

    peer: str
    network: str
    used_at: float
    is_served: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """The stream is taken. `gives_way` is the index of the one that ends for it, if there is no room for both."""

    gives_way: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The stream is not taken, for this reason, in words for the peer's user."""

    reason: str


def admission(streams: Sequence[OpenStream], new: OpenStream, *, now: float) -> Admitted | Refused:
    """What becomes of a `new` stream."""
    num_of_peer = sum(stream.peer == new.peer for stream in streams)
    if num_of_peer >= MAX_STREAMS_PER_PEER:
        return Refused(f"this peer has {num_of_peer} streams here, and {MAX_STREAMS_PER_PEER} are allowed")
    if len(streams) < (MAX_STREAMS if new.is_served else MAX_STREAMS - KEPT_STREAMS):
        return Admitted()
    giving_way = _gives_way(streams, new, now=now)
    if giving_way is not None:
        return Admitted(giving_way)
    num_of_network = sum(stream.network == new.network for stream in streams)
    if num_of_network > 1:
        return Refused(f"no stream is free, and the peers of {new.network} have {num_of_network} of them")
    return Refused("no stream is free")


def _gives_way(streams: Sequence[OpenStream], new: OpenStream, *, now: float) -> int | None:
    """The index of the stream that ends for a new one; None if the new one has no better claim than any."""
    of_network = Counter(stream.network for stream in streams)
    of_peer = Counter(stream.peer for stream in streams)
    most = max(of_network.values(), default=0)
    if most > of_network[new.network] + 1:
        among = [index for index, each in enumerate(streams) if of_network[each.network] == most]
    else:
        among = [
            index
            for index, each in enumerate(streams)
            if each.network == new.network and of_peer[each.peer] > of_peer[new.peer] + 1
        ]
    among = among or [index for index, each in enumerate(streams) if now - each.used_at >= IDLE_SECONDS]

    def claim(index: int) -> tuple[bool, int, float]:
        return streams[index].is_served, -of_peer[streams[index].peer], streams[index].used_at

    return min(among, key=claim, default=None)


@dataclass(frozen=True)
class ServedPeers:
    """The peers that have been served, and their networks: those that were served last come last."""

    networks: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, peer: str) -> bool:
        return peer in self.networks

    def with_served(self, peer: str, network: str) -> ServedPeers:
        """With one that was served now. The one of its network, or of all, that was served first is forgotten."""
        networks = {each: its for each, its in self.networks.items() if each != peer} | {peer: network}
        if sum(its == network for its in networks.values()) > MAX_SERVED_OF_NETWORK:
            del networks[next(each for each, its in networks.items() if its == network)]
        if len(networks) > MAX_SERVED:
            del networks[next(iter(networks))]
        return ServedPeers(networks)
