"""Which servers of a session push their outputs straight to the next, and which pairs cannot."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import pairwise

from shoal.client.decoding.stage import Stage
from shoal.client.swarm.broken_pairs import BrokenPairs
from shoal.protocol import Downstream, Upstream
from shoal.tensors import Encoding

UNPUSHED_PONGS = 6
"""So many answers in a row without a step say that it was not pushed. Each takes a round trip and a pause: two servers
that have not met need about as many round trips to get to know each other."""


class PushLinks:
    """Each server's place between two others, and the links by which they know each other."""

    def __init__(self, broken: BrokenPairs, *, wire: Encoding) -> None:
        self._broken = broken
        self._wire: Encoding = wire
        self._links: dict[tuple[Stage, Stage], str] = {}
        self._neighbors: dict[Stage, tuple[Upstream | None, Downstream | None]] = {}

    def link(self, stages: Sequence[Stage]) -> None:
        """These servers, in this order. Pairs that stay as they are keep their link."""
        pairs = [
            (upstream, downstream) for upstream, downstream in pairwise(stages) if self._can_push(upstream, downstream)
        ]
        self._links = {pair: self._links.get(pair) or secrets.token_hex(16) for pair in pairs}
        upstreams = {
            downstream: Upstream(peer=upstream.peer, link=link) for (upstream, downstream), link in self._links.items()
        }
        downstreams = {
            upstream: Downstream(peer=downstream.peer, link=link, addresses=downstream.hop.server.addresses[:8])
            for (upstream, downstream), link in self._links.items()
        }
        self._neighbors = {stage: (upstreams.get(stage), downstreams.get(stage)) for stage in stages}

    def _can_push(self, upstream: Stage, downstream: Stage) -> bool:
        peers = upstream.peer, downstream.peer
        knows_wire = all(self._wire in ("raw", *stage.hop.server.encodings) for stage in (upstream, downstream))
        return knows_wire and upstream.peer != downstream.peer and peers not in self._broken

    def neighbors_of(self, stage: Stage) -> tuple[Upstream | None, Downstream | None]:
        """Between whom a server is."""
        return self._neighbors.get(stage, (None, None))

    def pushes(self, upstream: Stage, downstream: Stage) -> bool:
        """Whether a server's outputs go straight to the next."""
        return (upstream, downstream) in self._links

    def broken_at(self, upstream: Stage, downstream: Stage) -> int | None:
        """The position of a step that has not got from one server to the next as it should; None if all went well.

        From then on, they are no pair any more.
        """
        unreached, upstream.unreached = upstream.unreached, None
        is_misled, downstream.is_misled = downstream.is_misled, False
        pushed = [request for request in downstream.requests if request.pushed]
        if unreached is not None and any(each.key == (unreached.epoch, unreached.position) for each in pushed):
            position = unreached.position
        elif (
            pushed and pushed[0] is downstream.requests[0] and (is_misled or _lacks(downstream, upstream.num_computed))
        ):
            position = pushed[0].position
        else:
            return None
        self._broken.add(upstream.peer, downstream.peer)
        self._links.pop((upstream, downstream), None)
        self._neighbors[upstream] = (self.neighbors_of(upstream)[0], None)
        self._neighbors[downstream] = (None, self.neighbors_of(downstream)[1])
        return position


def _lacks(stage: Stage, num_pushed: int) -> bool:
    """Whether a server lacks what the one before it has computed, and was to push to it."""
    if num_pushed < stage.requests[0].end:
        stage.num_idle_pongs = 0  # it cannot have it yet
    return stage.num_idle_pongs >= UNPUSHED_PONGS
