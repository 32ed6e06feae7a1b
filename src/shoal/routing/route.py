"""Which servers a client sends its tokens through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import MissingBlocks
from shoal.routing.view import SwarmView, format_blocks
from shoal.spans import ServerInfo, Span

UNKNOWN_ROUND_TRIP = 0.15
"""Seconds assumed for a server that was never measured (PETALS, arXiv 2312.08361)."""
HOP_OVERHEAD = 0.002
"""Seconds that a hop costs beyond its round trip: framing, queues, a thread's wake-up."""
NO_ROOM = 10.0
"""Seconds that a server costs which announces that its cache is full: better another one, or two (PETALS)."""
SLOWEST = 1e-3
"""Tokens per second of a server that announces none: usable if there is nobody else."""


@dataclass(frozen=True)
class Hop:
    """A span on one server."""

    server: ServerInfo
    span: Span


@dataclass(frozen=True)
class _Plan:
    """A way from some block to the end of the span, and the seconds that it takes."""

    seconds: float
    hops: tuple[Hop, ...]

    def preceded_by(self, block: int, server: ServerInfo) -> _Plan:
        hops, span = self.hops, Span(block, block + 1)
        if hops and hops[0].server is server:
            hops, span = hops[1:], Span(block, hops[0].span.end)
        block_seconds = 1 / (max(server.decode_speed, SLOWEST) * len(server.span))
        return _Plan(self.seconds + block_seconds, (Hop(server, span), *hops))

    def entered(self, round_trips: Mapping[str, float]) -> _Plan:
        server = self.hops[0].server
        round_trip = round_trips.get(server.peer, UNKNOWN_ROUND_TRIP)
        room = 0.0 if server.cache_tokens_left else NO_ROOM
        return _Plan(self.seconds + round_trip + HOP_OVERHEAD + room, self.hops)


def choose_route(
    view: SwarmView, span: Span, *, round_trips: Mapping[str, float], head: bool = False
) -> tuple[Hop, ...]:
    """The fastest chain of servers over a span: a shortest path over (server, block) (arXiv 2312.08361, section 3.2).

    A block costs its share of the server's announced time for a token; entering a server costs a round trip from the
    client, in seconds by peer id. Among equals the view's order decides, so that callers may shuffle it. With `head`,
    the chain ends at a server that offers the output head; the view must have one there.

    Raises `MissingBlocks` naming the blocks that nobody in the view holds.
    """
    if missing := view.missing(span):
        raise MissingBlocks(f"no server holds blocks {format_blocks(missing)}", blocks=missing)
    fastest = _Plan(0.0, ())  # from the block after this one to the end
    inside: dict[str, _Plan] = {}  # the same, when already on this server
    for block in range(span.end - 1, span.start - 1, -1):
        inside = {
            server.peer: min(inside.get(server.peer, fastest), fastest, key=_seconds).preceded_by(block, server)
            for server in view.servers
            if block in server.span and (server.head or not head or block < span.end - 1)
        }
        fastest = min((plan.entered(round_trips) for plan in inside.values()), key=_seconds)
    return fastest.hops


def _seconds(plan: _Plan) -> float:
    return plan.seconds
