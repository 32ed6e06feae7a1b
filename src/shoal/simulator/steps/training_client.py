"""A simulated client that trains: microbatches around the ring and back, one after another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import MissingBlocks
from shoal.policy.routing.route import Hop, Measured, Needs, choose_route
from shoal.simulator.steps.client_view import ClientView
from shoal.simulator.steps.routing_client import LOST_SECONDS, RETRY_SECONDS, Network
from shoal.simulator.steps.segment_server import Work
from shoal.simulator.timeline import Timeline
from shoal.spans import Span

BACKWARD_COST = 3
"""How many times a backward pass costs what a forward pass does: it computes that again, and two products more."""


@dataclass(frozen=True)
class _Visit:
    """A hop, the rows that it computes, who sends them, and whether the client gets what comes of them."""

    sender: str | None
    hop: Hop
    rows: int
    is_last: bool


def _trip(hops: Sequence[Hop], rows: int) -> list[_Visit]:
    """From the client through these hops and back."""
    senders = (None, *(hop.server.peer for hop in hops))
    return [_Visit(sender, hop, rows, hop is hops[-1]) for sender, hop in zip(senders, hops, strict=False)]


class TrainingClient:
    """Sends one microbatch at a time around the ring, and back. A microbatch that fails begins anew."""

    def __init__(
        self, timeline: Timeline, network: Network, view: ClientView, rng: random.Random, *, rows: int = 1024
    ) -> None:
        self.num_rows_done = 0
        self._timeline = timeline
        self._network = network
        self._view = view
        self._rng = rng
        self._rows = rows
        self._turns: list[_Visit] = []
        """The hops that the microbatch still visits."""
        self._turn = 0
        self._awaited: str | None = None

    def begin(self) -> None:
        """Find a route, and send a microbatch."""
        needs = Needs(step_tokens=self._rows, session=False)
        try:
            known = Measured(self._view.round_trips)
            route = choose_route(self._view.view, Span(0, self._view.view.num_blocks), needs=needs, known=known)
        except MissingBlocks:
            self._timeline.after(RETRY_SECONDS, self._again)
            return
        self._turns = _trip(route.hops, self._rows) + _trip(route.hops[::-1], BACKWARD_COST * self._rows)
        self._next()

    def _again(self) -> None:
        self._view.refresh()
        self.begin()

    def _next(self) -> None:
        self._turn += 1
        self._awaited = None
        if not self._turns:
            self.num_rows_done += self._rows
            self.begin()
            return
        visit = self._turns.pop(0)
        hop, peer, turn = visit.hop, visit.hop.server.peer, self._turn
        self._awaited = peer

        def computed() -> None:
            if turn != self._turn:
                return
            if visit.is_last:
                self._network.deliver(peer, None, self._rows, self._next)
            else:
                self._next()

        def arrive() -> None:
            server = self._network.server(peer)
            if server is None or not server.holds(hop.span):
                self._timeline.after(LOST_SECONDS, lambda: self.lost(peer, turn))
            else:
                server.submit(Work(hop.span, visit.rows, False, computed))

        self._network.deliver(visit.sender, peer, self._rows, arrive)

    def stopped(self, peer: str) -> None:
        """A server has stopped; the client notices if it waits for it."""
        turn = self._turn
        if self._awaited == peer:
            self._timeline.after(LOST_SECONDS, lambda: self.lost(peer, turn))

    def lost(self, peer: str, turn: int) -> None:
        """The server is gone: begin the microbatch anew with others."""
        if turn == self._turn:
            self._turn += 1
            self._view.lose(peer)
            self.begin()
