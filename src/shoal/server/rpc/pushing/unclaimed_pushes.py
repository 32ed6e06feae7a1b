"""Inputs of passes that came before the requests that they are for: a push may overtake what the client sends."""

from __future__ import annotations

from collections import OrderedDict

from shoal.net.wire import codec
from shoal.protocol import PassInputs

MAX_UNCLAIMED_BYTES = 64 << 20
"""Bytes, decoded, of all pushes that no request has claimed: any peer may push, and most come in time. The oldest are
dropped beyond; their clients send the inputs themselves."""
MAX_PEER_BYTES = 32 << 20
"""The same of one peer that pushes: the inputs of one pass of the widest models."""
MAX_UNCLAIMED = 64
"""The pushes of all peers, however small."""

Push = tuple[PassInputs, codec.Tensors]
Key = tuple[str, str]  # the peer that pushes, and the link


class UnclaimedPushes:
    """Holds the pushes of peers, each for a link, until they are claimed or others take their room."""

    def __init__(self) -> None:
        self._held: OrderedDict[Key, Push] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, peer: str, message: PassInputs, tensors: codec.Tensors) -> None:
        """Keep a push, if it is the first one over its link and not too large, and drop the oldest ones beyond."""
        key = peer, message.link
        if key in self._held or _num_bytes(tensors) > MAX_PEER_BYTES:
            return
        self._held[key] = message, tensors
        while self._num_bytes_of(peer) > MAX_PEER_BYTES:
            del self._held[next(each for each in self._held if each[0] == peer)]
        while len(self._held) > MAX_UNCLAIMED or self._num_bytes_of(None) > MAX_UNCLAIMED_BYTES:
            self._held.popitem(last=False)

    def claim(self, peer: str, link: str) -> Push | None:
        """Take what this peer has pushed over this link, if it is here."""
        return self._held.pop((peer, link), None)

    def _num_bytes_of(self, peer: str | None) -> int:
        """The bytes that are held of a peer, or of all."""
        return sum(_num_bytes(tensors) for (each, _), (_, tensors) in self._held.items() if peer in (None, each))


def _num_bytes(tensors: codec.Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
