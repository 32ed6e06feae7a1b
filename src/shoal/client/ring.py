"""Which servers of a session push their outputs straight to the next, and which pairs cannot."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import pairwise

from shoal.client.pairs import BrokenPairs
from shoal.client.share import Share
from shoal.protocol import After, Before
from shoal.tensors import Encoding

PUSH_PONGS = 6
"""So many answers in a row without a step say that it was not pushed. Each takes a round trip and a pause: two servers
that have not met need about as many round trips to get to know each other."""


class Ring:
    """Each server's place between two others, and the links by which they know each other."""

    def __init__(self, broken: BrokenPairs, *, wire: Encoding) -> None:
        self._broken = broken
        self._wire: Encoding = wire
        self._links: dict[tuple[Share, Share], str] = {}
        self._places: dict[Share, tuple[Before | None, After | None]] = {}

    def tie(self, shares: Sequence[Share]) -> None:
        """These servers, in this order. Pairs that stay as they are keep their link."""
        pairs = [(before, after) for before, after in pairwise(shares) if self._can_push(before, after)]
        self._links = {pair: self._links.get(pair) or secrets.token_hex(16) for pair in pairs}
        befores = {after: Before(peer=before.peer, link=link) for (before, after), link in self._links.items()}
        afters = {
            before: After(peer=after.peer, link=link, addresses=after.hop.server.addresses[:8])
            for (before, after), link in self._links.items()
        }
        self._places = {share: (befores.get(share), afters.get(share)) for share in shares}

    def _can_push(self, before: Share, after: Share) -> bool:
        peers = before.peer, after.peer
        knows_wire = all(self._wire in ("raw", *share.hop.server.encodings) for share in (before, after))
        return knows_wire and before.peer != after.peer and peers not in self._broken

    def place(self, share: Share) -> tuple[Before | None, After | None]:
        """Between whom a server is."""
        return self._places.get(share, (None, None))

    def pushes(self, before: Share, after: Share) -> bool:
        """Whether a server's outputs go straight to the next."""
        return (before, after) in self._links

    def broken_at(self, before: Share, after: Share) -> int | None:
        """The position of a step that has not got from one server to the next as it should; None if all went well.

        From then on, they are no pair any more.
        """
        unreached, before.unreached = before.unreached, None
        is_misled, after.is_misled = after.is_misled, False
        pushed = [request for request in after.requests if request.pushed]
        if unreached is not None and any(each.key == (unreached.epoch, unreached.position) for each in pushed):
            position = unreached.position
        elif pushed and pushed[0] is after.requests[0] and (is_misled or _lacks(after, before.num_computed)):
            position = pushed[0].position
        else:
            return None
        self._broken.add(before.peer, after.peer)
        self._links.pop((before, after), None)
        self._places[before] = (self.place(before)[0], None)
        self._places[after] = (None, self.place(after)[1])
        return position


def _lacks(share: Share, num_pushed: int) -> bool:
    """Whether a server lacks what the one before it has computed, and was to push to it."""
    if num_pushed < share.requests[0].end:
        share.num_lacking = 0  # it cannot have it yet
    return share.num_lacking >= PUSH_PONGS
