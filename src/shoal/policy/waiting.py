"""How long a client waits for blocks that no server computes now, and when it looks again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shoal.peers import ServerInfo
from shoal.policy.view import SwarmView, format_blocks
from shoal.spans import Span

LOOK_SECONDS = 3.0
"""A client that waits reads the directory this often: rarely enough for the directory, and soon after a server is
ready."""
ANNOUNCED_SECONDS = 0.5
"""So long after the time at which a server expects to be ready, its record may say that it is."""
LATE_SECONDS = 15.0
"""For so long after that time, the client looks every second. A server that is later than that may never come."""
LATE_LOOK_SECONDS = 1.0
MOST_NAMED = 3
"""How many servers a line names."""


@dataclass(frozen=True)
class MissingSince:
    """For how long one call has lacked some blocks: `since` is the time of each, by block.

    A server that is found, and fails again, ends nothing: only other blocks begin anew.
    """

    since: Mapping[int, float] = field(default_factory=dict)

    def also(self, blocks: Iterable[int], *, now: float) -> MissingSince:
        """With blocks that the call lacks at the time `now`."""
        return MissingSince(dict.fromkeys(blocks, now) | dict(self.since))

    def seconds(self, blocks: Iterable[int], *, now: float) -> float:
        """For how long the call has lacked the first of these blocks."""
        return max((now - self.since.get(block, now) for block in blocks), default=0.0)


def seconds_to_ready(loading: SwarmView, blocks: Collection[int], *, now: float) -> float | None:
    """Seconds until the servers that are `loading` hold all of these blocks, as they announce.

    `now` is the Unix time. It is negative if they should be ready already, and `None` if for some block no server says
    when it will be ready.
    """
    latest: float | None = None
    for here in _holders(loading, blocks):
        times = [server.ready_at - now for server in here if server.ready_at is not None]
        if not times:
            return None
        latest = min(times) if latest is None else max(latest, min(times))
    return latest


def seconds_to_look(ready_in: float | None) -> float:
    """Seconds until the client reads the directory again; servers are expected to be ready in `ready_in` seconds."""
    if ready_in is None or ready_in < -LATE_SECONDS:
        return LOOK_SECONDS
    if ready_in <= 0:
        return LATE_LOOK_SECONDS
    return min(ready_in + ANNOUNCED_SECONDS, LOOK_SECONDS)


def outlook(loading: SwarmView, blocks: Collection[int], *, now: float) -> str:
    """What a client that waits for these blocks may expect: who is loading them, and when they are ready.

    `now` is the Unix time.
    """
    found = {server.peer: server for here in _holders(loading, blocks) for server in here}
    if not found:
        return f"the swarm is asked again every {LOOK_SECONDS:.0f} s"
    soonest = sorted(found.values(), key=lambda each: float("inf") if each.ready_at is None else each.ready_at)
    named = [_loads(server, now=now) for server in soonest[:MOST_NAMED]]
    if len(soonest) > MOST_NAMED:
        named.append(f"and {len(soonest) - MOST_NAMED} more load some of them")
    loaded = {block for server in soonest for block in server.span}
    if unloaded := [block for block in blocks if block not in loaded]:
        named.append(f"no server loads {format_blocks(unloaded)} yet")
    return ", ".join(named)


def loaders(loading: SwarmView, blocks: Collection[int]) -> frozenset[str]:
    """The peers that are loading some of these blocks."""
    return frozenset(server.peer for here in _holders(loading, blocks) for server in here)


def _holders(view: SwarmView, blocks: Collection[int]) -> list[list[ServerInfo]]:
    if not blocks:
        return []
    span = Span(min(blocks), max(blocks) + 1)
    return [here for block, here in zip(span, view.holders(span), strict=True) if block in blocks]


def _loads(server: ServerInfo, *, now: float) -> str:
    name = server.name or server.peer[-6:]
    if server.ready_at is None:
        return f"{name} loads {server.span}"
    seconds = server.ready_at - now
    if seconds < 0:
        return f"{name} loads {server.span} and should have been ready {-seconds:.0f} s ago"
    return f"{name} loads {server.span} and expects to be ready in {seconds:.0f} s"
