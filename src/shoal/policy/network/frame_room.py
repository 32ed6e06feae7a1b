"""Which frames may be received at the same time: their bytes are in memory until they are complete.

A frame takes the room of all its bytes when it begins. One that has no room waits, and costs nothing while it does.
Room is shared between networks (`stream_room`): of the frames that wait, one of the network that holds the least is
next. So a network that sends much waits for itself, and not others for it.

A sender that begins a frame and does not go on with it would hold its room for ever. Therefore, while others wait, a
frame gives way that is *late*: slower than the slowest link that shoal works with. So does one of a network that holds
more than twice of what the waiting one would, if that has waited for `PATIENCE_SECONDS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BYTES = 256 << 20
"""Bytes of all frames that are being received: one of the largest, or many."""
MAX_PEER_BYTES = 64 << 20
"""Bytes of the frames of one peer. A larger frame is received when the peer holds nothing else."""
SMALL_BYTES = 256 << 10
"""A frame that is not larger than this, such as a token's, does not wait if its network holds little."""
FREE_BYTES = 1 << 20
"""What a network may hold in small frames that do not wait, also beyond `MAX_BYTES`."""
MAX_WAITING_OF_NETWORK = 64
"""The frames of one network that wait. The streams of those beyond end: each of them keeps some bytes in buffers."""
GRACE_SECONDS = 5.0
"""The time in which a frame need not be at the speed of the slowest link yet."""
PATIENCE_SECONDS = 1.0
"""How long a frame waits before one of a network that holds much more gives way to it."""
IMBALANCE = 2
"""How many times as much as the waiting network a network holds that gives way."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of `num_bytes` bytes that is received, or waits to be, since a time `since`.

    `num_received` of its bytes have come. `network` is that of its peer.
    """

    peer: str
    network: str
    num_bytes: int
    since: float
    num_received: int = 0


def next_frame(held: Sequence[Frame], waiting: Sequence[Frame], *, max_bytes: int, max_peer_bytes: int) -> int | None:
    """The index of the waiting frame that is received next; None if none has room.

    Frames of a peer keep their order. What is next and does not fit keeps out all but small ones, so it comes to its
    turn. A frame that is larger than all room is received when no other large one is.
    """
    of_network, of_peer = Counter[str](), Counter[str]()
    for frame in held:
        of_network[frame.network] += frame.num_bytes
        of_peer[frame.peer] += frame.num_bytes
    seen: set[str] = set()
    candidates: list[int] = []
    for index, frame in enumerate(waiting):
        if frame.peer in seen:
            continue
        seen.add(frame.peer)
        if frame.num_bytes <= SMALL_BYTES and of_network[frame.network] + frame.num_bytes <= FREE_BYTES:
            return index
        if not of_peer[frame.peer] or of_peer[frame.peer] + frame.num_bytes <= max_peer_bytes:
            candidates.append(index)
    chosen = min(candidates, key=lambda index: (of_network[waiting[index].network], index), default=None)
    if chosen is None:
        return None
    fits = sum(of_network.values()) + waiting[chosen].num_bytes <= max_bytes
    return chosen if fits or all(frame.num_bytes <= SMALL_BYTES for frame in held) else None


def gives_way(
    held: Sequence[Frame], waiting: Sequence[Frame], *, max_peer_bytes: int, slowest_link: float, now: float
) -> int | None:
    """The index of the frame that ends so that one that waits has room; None if none does now.

    `slowest_link` is in bytes per second. The frames of a peer share its link.
    """
    of_network, of_peer, num_of_peer = Counter[str](), Counter[str](), Counter[str]()
    for frame in held:
        of_network[frame.network] += frame.num_bytes
        of_peer[frame.peer] += frame.num_bytes
        num_of_peer[frame.peer] += 1
    late = [
        index
        for index, frame in enumerate(held)
        if frame.num_received < (now - frame.since - GRACE_SECONDS) * slowest_link / num_of_peer[frame.peer]
    ]
    for frame in waiting:
        waits_for_own_peer = of_peer[frame.peer] and of_peer[frame.peer] + frame.num_bytes > max_peer_bytes
        helpful = [index for index in late if not waits_for_own_peer or held[index].peer == frame.peer]
        if helpful:
            return max(helpful, key=lambda index: held[index].num_bytes)
        largest = max(of_network, key=lambda network: of_network[network], default=frame.network)
        would_hold = of_network[frame.network] + frame.num_bytes
        is_patient = now - frame.since >= PATIENCE_SECONDS and not waits_for_own_peer
        if is_patient and of_network[largest] > IMBALANCE * would_hold:
            among = [index for index, each in enumerate(held) if each.network == largest]
            return min(among, key=lambda index: held[index].num_received / held[index].num_bytes)
    return None
