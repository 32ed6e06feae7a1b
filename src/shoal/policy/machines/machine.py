"""Servers as placement sees them: what each could hold and compute, and what it holds now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    per second that the network of one carries. `span` is what it holds or loads now, `None` before it has chosen.
    `kept` are those of these blocks that it serves while it loads the rest. A machine that is not `movable` is counted
    where it is. Loading a block takes `load_seconds`, or `disk_seconds` if it is in one of the spans `on_disk`. `zone`
    is where it may fail together with others. `up_since` and `ready_at` are times; `ready_at` is 0 for a server that is
    online.
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
    kept: Span | None = None
    count: int = 1

    @property
    def serves(self) -> Span | None:
        """The blocks that it serves now, and goes on serving."""
        return self.span if self.ready_at == 0.0 else self.kept

    def block_speed(self, num_blocks: int) -> float:
        """Tokens per second of one block in a span of `num_blocks`: linear between the lengths that are known."""
        return block_speed_at(self.block_speeds, num_blocks)

    def speed(self, num_blocks: int) -> float:
        """Tokens per second through a whole span of `num_blocks` blocks: what the processor and the network allow."""
        return min(self.block_speed(num_blocks) / num_blocks, self.network_speed)

    def keeps(self, span: Span) -> Span | None:
        """The blocks that it would go on serving if it went from its present span to this one."""
        return kept_blocks(self.span, span, self.max_blocks)

    def seconds_to_load(self, span: Span) -> float:
        """How long it takes to load what a span needs: all of it, or what is missing if it keeps the other blocks."""
        missing = (
            list(span) if self.keeps(span) is None else [block for block in span if block not in (self.span or ())]
        )
        on_disk = sum(any(block in own for own in self.on_disk) for block in missing)
        return on_disk * self.disk_seconds + (len(missing) - on_disk) * self.load_seconds


def kept_blocks(held: Span | None, wanted: Span, max_blocks: int) -> Span | None:
    """The blocks that a server never stops serving while it goes from the span `held` to `wanted`; `None` for none.

    If it has room for all blocks of both, it serves the ones that it holds until it has loaded the others. Otherwise it
    first frees what it holds.
    """
    if held is None:
        return None
    start, end = max(held.start, wanted.start), min(held.end, wanted.end)
    if start >= end or max(held.end, wanted.end) - min(held.start, wanted.start) > max_blocks:
        return None
    return Span(start, end)


def machines_of(server: ServerInfo, *, now: float) -> tuple[Machine, ...]:
    """A server of a view as placement sees it, at the Unix time `now`: nothing if it is leaving.

    One that only claims other blocks occurs twice: where it serves, and where it wants to go. One that loads them while
    it serves occurs where it goes, with the blocks that it keeps. One that has measured nothing yet, or that is
    loading, counts where it is and does not move.
    """
    held = machine_of(server, now=now)
    if held is None:
        return ()
    if server.wants is None:
        return (held,)
    ready_at = _ready_at(server, now)
    there = replace(held, span=server.wants, kept=held.keeps(server.wants), ready_at=ready_at, movable=False)
    return (held, there) if server.ready_at is None else (there,)


def _ready_at(server: ServerInfo, now: float) -> float:
    """When a server that loads will be ready. Never 0, whatever it announces: it is not online."""
    return now + ASSUMED_LOAD_SECONDS if server.ready_at is None else max(server.ready_at, 1.0)


def machine_of(server: ServerInfo, *, now: float) -> Machine | None:
    """A server in the span that it serves, or that it loads while it serves none; `None` if it counts for no block."""
    if not server.state.counts:
        return None
    length, capacity = len(server.span), server.capacity
    up_since = now if server.up_since is None else min(now, server.up_since)
    loading = server.state is ServerState.JOINING
    ready_at = _ready_at(server, now) if loading else 0.0
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


def one_place_each(machines: Iterable[Machine]) -> list[Machine]:
    """One entry of each peer, in the order of peer ids: the latest of those that load, else the latest of all."""
    places: dict[str, Machine] = {}
    for machine in machines:
        other = places.get(machine.peer)
        if other is None or _recency(machine) > _recency(other):
            places[machine.peer] = machine
    return [places[peer] for peer in sorted(places)]


def _recency(machine: Machine) -> tuple[float, float, int, int, int]:
    span = machine.span
    start, end = (-1, -1) if span is None else (span.start, span.end)
    return (machine.ready_at, machine.up_since, start, end, machine.count)
