"""A simulated client: conversations over routes of the live rules, with replays after failures and waits for holes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.errors import MissingBlocks
from shoal.policy.routing.route import Chooser, Hop, Measured, Needs, choose_route
from shoal.simulator.steps.client_view import ClientView
from shoal.simulator.steps.segment_server import SegmentServer, Work
from shoal.simulator.timeline import Timeline
from shoal.spans import Span

PIECE = 256
"""Prompts and replays travel in pieces of this many tokens, so that all servers of a route work at once."""
LOST_SECONDS = 1.75
"""Seconds after which a client knows that a server that it waits for is gone (`shoal.policy.liveness`)."""
RETRY_SECONDS = 5.0
"""Seconds after which a client that waits for a block reads the directory again."""


class Network(Protocol):
    """Where the servers are."""

    def server(self, peer: str) -> SegmentServer | None:
        """The server with this peer id, `None` if it does not serve."""

    def deliver(self, sender: str | None, receiver: str | None, rows: float, arrive: Callable[[], None]) -> None:
        """Call `arrive` once a message with `rows` rows has travelled, and been taken in. `None` is the client."""


@dataclass(frozen=True)
class Talk:
    """One request: a prompt and an answer, in tokens, and the pause after it in seconds."""

    prompt: int
    answer: int
    pause: float


@dataclass
class Tally:
    """What happened to clients, in seconds, from the time `begins` on.

    `first_tokens` are the times from a request to its first token, `gaps` those between tokens, `recoveries` those for
    which a session stood still because of lost servers or missing blocks.
    """

    begins: float = 0.0
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_talks: int = 0
    num_replayed: int = 0
    num_waits: int = 0


@dataclass(frozen=True)
class Habits:
    """How a client behaves: what it asks (`draw`), and how it chooses routes."""

    draw: Callable[[random.Random], Talk]
    chooser: Chooser = "shortest"


class RoutingClient:
    """One conversation after another, for ever. A step goes around the ring: n + 1 messages for n servers.

    The client notices a lost server only while it waits for it. The servers that replace it compute the session's past
    again, before the step goes on. It waits while a block has no server, and reads the directory again meanwhile.
    """

    def __init__(
        self,
        timeline: Timeline,
        network: Network,
        view: ClientView,
        habits: Habits,
        tally: Tally,
        rng: random.Random,
    ) -> None:
        self._timeline = timeline
        self._network = network
        self._view = view
        self._habits = habits
        self._tally = tally
        self._rng = rng
        self._hops: list[Hop] = []
        self._epoch = 0
        self._talk = Talk(0, 0, 0.0)
        self._known = 0
        """Tokens that all servers of the route have computed."""
        self._asked_at = 0.0
        self._fresh: set[Hop] = set()
        """Hops whose servers lack what the others have computed."""
        self._lost_at: float | None = None
        """Since when the session cannot go on, because of a lost server or a missing block."""

    # -- a conversation ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask something. The rest follows."""
        self._talk = self._habits.draw(self._rng)
        self._known, self._hops, self._lost_at = 0, [], None
        self._asked_at = self._timeline.now
        self._repair()

    def _step(self) -> None:
        """Send what no server has computed yet: the prompt, or a token."""
        rows = self._talk.prompt if not self._known else 1
        self._send(rows, from_hop=0, done=self._answered)

    def _answered(self) -> None:
        now, tally = self._timeline.now, self._tally
        first = not self._known
        self._known += self._talk.prompt if first else 1
        if now >= tally.begins:
            (tally.first_tokens if first else tally.gaps).append(now - self._asked_at)
            tally.num_tokens += 1
        self._asked_at = now
        if self._known < self._talk.prompt + self._talk.answer - 1:
            self._step()
            return
        tally.num_talks += now >= tally.begins
        self._epoch += 1
        self._hops = []
        self._timeline.after(self._talk.pause, self.begin)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _send(self, rows: int, *, from_hop: int, done: Callable[[], None], to_hop: int | None = None) -> None:
        """Send rows through hops in pieces; `done` when the last piece has come through all of them."""
        self._epoch += 1
        epoch, end = self._epoch, len(self._hops) if to_hop is None else to_hop
        pieces = [PIECE] * (rows // PIECE) + ([rows % PIECE] if rows % PIECE else [])
        left = len(pieces)

        def back() -> None:
            nonlocal left
            left -= 1
            if not left and epoch == self._epoch:
                done()

        for piece in pieces:
            self._pass_on(piece, from_hop, end, epoch, back, decodes=rows == 1, sender=self._peer(from_hop - 1))

    def _pass_on(
        self, rows: int, hop: int, end: int, epoch: int, back: Callable[[], None], *, decodes: bool, sender: str | None
    ) -> None:
        """To the hop, or back to the client behind the last one."""
        if hop == end:
            self._network.deliver(sender, None, rows, back)
            return
        peer, span = self._hops[hop].server.peer, self._hops[hop].span

        def computed() -> None:
            if epoch == self._epoch:
                self._pass_on(rows, hop + 1, end, epoch, back, decodes=decodes, sender=peer)

        def arrive() -> None:
            if epoch != self._epoch:
                return
            server = self._network.server(peer)
            if server is None or not server.holds(span):
                self._timeline.after(LOST_SECONDS, lambda: self.lost(peer, epoch))
                return
            server.submit(Work(span, rows, decodes, computed))

        self._network.deliver(sender, peer, rows, arrive)

    def _peer(self, hop: int) -> str | None:
        return self._hops[hop].server.peer if hop >= 0 else None

    # -- failures ------------------------------------------------------------------------------------------------------

    @property
    def peers(self) -> set[str]:
        """The servers of its route; empty between two conversations."""
        return {hop.server.peer for hop in self._hops}

    def stopped(self, peer: str) -> None:
        """The server has stopped. The client, which pings the servers that it uses, notices it a moment later."""
        epoch = self._epoch
        if peer in self.peers:
            self._timeline.after(LOST_SECONDS, lambda: self.lost(peer, epoch))

    def lost(self, peer: str, epoch: int) -> None:
        """The client has noticed that a server is gone: it replaces the server, and goes on with the step."""
        if epoch != self._epoch or peer not in self.peers:
            return
        self._view.lose(peer)
        self._hops = [hop for hop in self._hops if hop.server.peer != peer]
        if self._lost_at is None:
            self._lost_at = self._timeline.now
        self._repair()

    def _repair(self) -> None:
        """Choose servers for what the route lacks, now or later; then bring them to where the others are."""
        self._epoch += 1
        while (gap := _first_gap(self._hops, self._view.view.num_blocks)) is not None:
            at, span = gap
            try:
                found = self._choose(at, span)
            except MissingBlocks:
                self._wait()
                return
            self._hops[at:at] = found
            self._fresh.update(found)
        if self._known:
            self._catch_up()
        else:
            self._go_on()

    def _choose(self, at: int, span: Span) -> tuple[Hop, ...]:
        talk = self._talk
        needs = Needs(
            prompt_tokens=self._known or talk.prompt,
            num_steps=max(1, talk.prompt + talk.answer - max(self._known, talk.prompt)),
            needed_tokens=talk.prompt + talk.answer,
        )
        route = choose_route(
            self._view.view,
            span,
            needs=needs,
            known=Measured(self._view.round_trips),
            upstream=self._hops[at - 1].server if at else None,
            downstream=self._hops[at].server if at < len(self._hops) else None,
            chooser=self._habits.chooser,
            rng=self._rng,
        )
        return route.hops

    def _wait(self) -> None:
        """A block has no server: read the directory again later."""
        if self._lost_at is None:
            self._lost_at = self._timeline.now
        self._tally.num_waits += self._timeline.now >= self._tally.begins
        epoch = self._epoch

        def again() -> None:
            if epoch == self._epoch:
                self._view.refresh()
                self._repair()

        self._timeline.after(RETRY_SECONDS, again)

    def _catch_up(self) -> None:
        """New servers compute what the others have computed, one run of neighbors after another."""
        first = next((index for index, hop in enumerate(self._hops) if hop in self._fresh), None)
        if first is None:
            self._go_on()
            return
        end = first
        while end < len(self._hops) and self._hops[end] in self._fresh:
            end += 1
        hops = self._hops[first:end]
        self._tally.num_replayed += self._known

        def caught_up() -> None:
            self._fresh.difference_update(hops)
            self._catch_up()

        self._send(self._known, from_hop=first, to_hop=end, done=caught_up)

    def _go_on(self) -> None:
        """All servers of the route have what came before: the step is sent to them (again)."""
        self._fresh.clear()
        if self._lost_at is not None and self._timeline.now >= self._tally.begins:
            self._tally.recoveries.append(self._timeline.now - self._lost_at)
        self._lost_at = None
        self._step()


def _first_gap(hops: Sequence[Hop], num_blocks: int) -> tuple[int, Span] | None:
    """The first blocks that no hop computes, and the index at which their hops belong."""
    at = 0
    for index, hop in enumerate(hops):
        if hop.span.start > at:
            return index, Span(at, hop.span.start)
        at = hop.span.end
    return None if at == num_blocks else (len(hops), Span(at, num_blocks))
