"""Servers as placement sees them: what each could hold and compute, and what it holds now."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.peers import ServerInfo, ServerState, block_speed_at
from shoal.policy.view import ASSUMED_SPEED
from shoal.spans import Span

ASSUMED_LOAD_SECONDS = 60.0
"""Seconds to load a span, assumed of a server that has not measured it."""


@dataclass(frozen=True)
class Machine:
    """`count` servers that are alike, of which one is `peer`.

    Each could hold up to `max_blocks` blocks. `block_speeds` are pairs of a span's length and the saturated speed with
    such a span, in tokens per second of one block (`shoal.peers.Capacity`); never empty. `network_speed` is the tokens
    per second that the network of one carries. `span` is what it holds or loads now, `None` before it has chosen. A
    machine that is not `movable` is counted where it is. Loading a block takes `load_seconds`, or `disk_seconds` if it
    is in one of the spans `on_disk`. `zone` is where it may fail together with others. `up_since` and `ready_at` are
    times; `ready_at` is 0 for a server that is online.
    """

    peer: str
    span: Span | None
    max_blocks: int
    block_speeds: tuple[tuple[int, float], ...]
    network_speed: float = float("inf")
    movable: bool = True
    load_seconds: float = 1.0
    disk_seconds: float = 1.0
    on_disk: tuple[Span, ...] = ()
    zone: str = ""
    up_since: float = 0.0
    ready_at: float = 0.0
    count: int = 1

    def block_speed(self, num_blocks: int) -> float:
        """Tokens per second of one block in a span of `num_blocks`: linear between the lengths that are known."""
        return block_speed_at(self.block_speeds, num_blocks)

    def speed(self, num_blocks: int) -> float:
        """Tokens per second through a whole span of `num_blocks` blocks: what the processor and the network allow."""
        return min(self.block_speed(num_blocks) / num_blocks, self.network_speed)

    def seconds_to_load(self, span: Span) -> float:
        """How long the blocks of a span take to load."""
        on_disk = sum(any(block in own for own in self.on_disk) for block in span)
        return on_disk * self.disk_seconds + (len(span) - on_disk) * self.load_seconds


def machine_of(server: ServerInfo, *, now: float) -> Machine | None:
    """A server of a view, at the Unix time `now`; `None` if it is leaving.

    One that has measured nothing yet, or that is loading, counts where it is and does not move.
    """
    if server.state is ServerState.LEAVING:
        return None
    length, capacity = len(server.span), server.capacity
    up_since = now if server.up_since is None else min(now, server.up_since)
    loading = server.state is ServerState.JOINING
    ready_at = 0.0 if not loading else now + ASSUMED_LOAD_SECONDS if server.ready_at is None else server.ready_at
    if capacity is None:
        speed = (server.decode_speed or ASSUMED_SPEED) * length
        return Machine(
            server.peer,
            server.span,
            length,
            ((length, speed),),
            movable=False,
            zone=server.zone,
            up_since=up_since,
            ready_at=ready_at,
        )
    return Machine(
        server.peer,
        server.span,
        max(capacity.max_blocks, length),
        capacity.block_speeds,
        network_speed=capacity.network_speed or float("inf"),
        movable=not server.pinned and not loading,
        load_seconds=capacity.load_seconds,
        disk_seconds=capacity.disk_seconds,
        on_disk=capacity.on_disk,
        zone=server.zone,
        up_since=up_since,
        ready_at=ready_at,
    )
