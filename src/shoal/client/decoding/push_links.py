"""Which servers of a session push their outputs to the next server, and which pairs of servers cannot."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import pairwise

from shoal.client.decoding.progress import StageStatus
from shoal.client.decoding.stage import Neighbors, Stage
from shoal.client.swarm.broken_pairs import UNPUSHED_PONGS, PushRules
from shoal.protocol import Upstream


class PushLinks:
    """Who are the neighbors of each server in the ring, and by which link the servers of a pair recognize each other.

    A link is a random name of 32 hex digits. The `rules` say which servers may push to each other.
    """

    def __init__(self, rules: PushRules) -> None:
        self._rules = rules
        self._links: dict[tuple[Stage, Stage], str] = {}
        self._neighbors: dict[Stage, Neighbors] = {}

    def link(self, stages: Sequence[Stage]) -> None:
        """Connect these servers in this order. Pairs that stay as they are keep their link."""
        pairs = [
            (upstream, downstream)
            for upstream, downstream in pairwise(stages)
            if self._rules.allow(upstream.hop.server, downstream.hop.server)
        ]
        self._links = {pair: self._links.get(pair) or secrets.token_hex(16) for pair in pairs}
        upstreams = {
            downstream: Upstream(peer=upstream.peer, link=link) for (upstream, downstream), link in self._links.items()
        }
        downstreams = {
            upstream: self._rules.downstream_of(upstream.hop.server, downstream.hop.server, link)
            for (upstream, downstream), link in self._links.items()
        }
        self._neighbors = {stage: (upstreams.get(stage), downstreams.get(stage)) for stage in stages}

    def neighbors_of(self, stage: Stage) -> Neighbors:
        """The servers from which and to which a server pushes."""
        return self._neighbors.get(stage, (None, None))

    def pushes(self, upstream: Stage, downstream: Stage) -> bool:
        """Whether the first server pushes its outputs to the second."""
        return (upstream, downstream) in self._links

    def break_failed(self, upstream: Stage, downstream: Stage) -> int | None:
        """The position of a step that did not get from one server to the next as it should; None if there is none.

        The two are no pair from then on.
        """
        unreached = upstream.take_unreached()
        pending = downstream.progress.pending
        pushed = [step for step in pending if step.pushed]
        if unreached is not None and any(step.key == (unreached.epoch, unreached.position) for step in pushed):
            position = unreached.position
        elif pushed and pushed[0] is pending[0] and (_is_misled(downstream) or _lacks_push(upstream, downstream)):
            position = pushed[0].position
        else:
            return None
        self._rules.broken.add(upstream.peer, downstream.peer)
        self._unlink(upstream, downstream)
        return position

    def unlink_broken(self) -> None:
        """Let no server push to another if this pair has become broken, in any session."""
        for upstream, downstream in list(self._links):
            if (upstream.peer, downstream.peer) in self._rules.broken:
                self._unlink(upstream, downstream)

    def _unlink(self, upstream: Stage, downstream: Stage) -> None:
        self._links.pop((upstream, downstream), None)
        self._neighbors[upstream] = (self.neighbors_of(upstream)[0], None)
        self._neighbors[downstream] = (None, self.neighbors_of(downstream)[1])


def _is_misled(stage: Stage) -> bool:
    return stage.status is StageStatus.MISLED


def _lacks_push(upstream: Stage, downstream: Stage) -> bool:
    """Whether `downstream` lacks its oldest step although `upstream`, which has to push it, has computed it."""
    if upstream.progress.num_computed < downstream.progress.pending[0].end:
        downstream.forget_idle_pongs()
    return downstream.progress.num_idle_pongs >= UNPUSHED_PONGS
