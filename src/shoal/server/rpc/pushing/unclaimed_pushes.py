"""Inputs of passes that came before the requests that they are for: a push may overtake what the client sends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shoal.net.wire import codec
from shoal.protocol import PassInputs

MAX_UNCLAIMED_BYTES = 64 << 20
"""Bytes, decoded, of all pushes that no request has claimed: any peer may push, and most come in time. Beyond, the peer
with the most of them loses its oldest one; the client of that sends the inputs itself."""
MAX_PEER_BYTES = 32 << 20
"""The same of one peer that pushes: the inputs of one pass of the widest models."""
LEAST_BYTES = 1 << 20
"""What a push counts for at least: so there are few, however small."""
HOLD_SECONDS = 30.0
"""How long a push is held before its request comes."""

Push = tuple[PassInputs, codec.Tensors]
Key = tuple[str, str]  # the peer that pushes, and the link


@dataclass(frozen=True)
class _Held:
    """A push, and when it came."""

    push: Push
    since: float

    @property
    def size(self) -> int:
        """What it counts for, in bytes."""
        return _size(self.push[1])


class UnclaimedPushes:
    """Holds the pushes of peers, each for a link, until they are claimed, are too old, or others take their room."""

    def __init__(self) -> None:
        self._held: dict[Key, _Held] = {}  # the oldest one first

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, peer: str, message: PassInputs, tensors: codec.Tensors, *, now: float) -> None:
        """Keep a push, if it is the first one over its link and not too large. Others may have to give way."""
        key = peer, message.link
        if key in self._held or _size(tensors) > MAX_PEER_BYTES:
            return
        self._held[key] = _Held((message, tensors), now)
        while (sizes := self._sizes())[peer] > MAX_PEER_BYTES:
            self._drop_oldest_of(peer)
        while sizes.total() > MAX_UNCLAIMED_BYTES:
            self._drop_oldest_of(sizes.most_common(1)[0][0])
            sizes = self._sizes()

    def claim(self, peer: str, link: str) -> Push | None:
        """Take what this peer has pushed over this link, if it is here."""
        held = self._held.pop((peer, link), None)
        return None if held is None else held.push

    def sweep(self, now: float) -> float | None:
        """Drop what has been held for `HOLD_SECONDS`. Returns when the next one is too old; `None` if nothing is held.

        Times are in seconds.
        """
        while self._held:
            key, oldest = next(iter(self._held.items()))
            if now < oldest.since + HOLD_SECONDS:
                return oldest.since + HOLD_SECONDS
            del self._held[key]
        return None

    def _sizes(self) -> Counter[str]:
        """What the pushes of each peer count for, in bytes."""
        sizes: Counter[str] = Counter()
        for (peer, _), held in self._held.items():
            sizes[peer] += held.size
        return sizes

    def _drop_oldest_of(self, peer: str) -> None:
        del self._held[next(key for key in self._held if key[0] == peer)]


def _size(tensors: codec.Tensors) -> int:
    return max(LEAST_BYTES, sum(tensor.nbytes for tensor in tensors.values()))
