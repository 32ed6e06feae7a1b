"""Which servers a client keeps of all that it has read about: the nearest, random ones, and some for every block."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shoal.peers import ServerInfo, ServerState, short

if TYPE_CHECKING:
    import random

MOST_KEPT = 1000
"""Servers that a client keeps. Half of them nearest and half random cost a step 0 to 1 % against keeping 10,000."""
FEWEST_HOLDERS = 8
"""Of each block, at least this many holders are kept, or all if there are fewer."""


def estimated_round_trips(servers: Sequence[ServerInfo], measured: Mapping[str, float]) -> dict[str, float]:
    """The round trips in seconds to servers of which anything is known, by peer id.

    Those that were `measured` are as they are. Another server is at most as far as the way over a measured one from
    which it announces its distance, and about as far as the measured ones of its zone are in the middle.
    """
    found: dict[str, float] = {}
    by_name = {short(peer): seconds for peer, seconds in measured.items()}
    in_zone: dict[str, list[float]] = {}
    for server in servers:
        if server.zone and server.peer in measured:
            in_zone.setdefault(server.zone, []).append(measured[server.peer])
    zones = {zone: statistics.median(seconds) for zone, seconds in in_zone.items()}
    for server in servers:
        if server.peer in measured:
            found[server.peer] = measured[server.peer]
            continue
        ways = [by_name[name] + seconds for name, seconds in server.round_trips if name in by_name]
        if server.zone in zones:
            ways.append(zones[server.zone])
        if ways:
            found[server.peer] = min(ways)
    return found


def keep(
    servers: Sequence[ServerInfo],
    measured: Mapping[str, float],
    *,
    num_blocks: int,
    rng: random.Random,
    most: int = MOST_KEPT,
) -> list[ServerInfo]:
    """At most `most` of the servers, all if there are no more: half of them the nearest, the others random.

    `measured` are round trips in seconds, by peer id. Of each block `FEWEST_HOLDERS` online holders are kept first,
    even if these alone are more than `most`.
    """
    if len(servers) <= most:
        return list(servers)
    shuffled = list(servers)
    rng.shuffle(shuffled)
    distances = estimated_round_trips(servers, measured)
    nearest = sorted((each for each in shuffled if each.peer in distances), key=lambda each: distances[each.peer])
    kept = {server.peer: server for server in _holders((*nearest, *shuffled), num_blocks)}
    near = [server for server in nearest if server.peer not in kept][: max(most - len(kept), 0) // 2]
    kept |= {server.peer: server for server in near}
    others = [server for server in shuffled if server.peer not in kept][: max(most - len(kept), 0)]
    kept |= {server.peer: server for server in others}
    return [server for server in servers if server.peer in kept]


def _holders(servers: Sequence[ServerInfo], num_blocks: int) -> list[ServerInfo]:
    """The first servers that give each block some holders, if all servers do."""
    missing = [FEWEST_HOLDERS] * num_blocks
    chosen: dict[str, ServerInfo] = {}
    for server in servers:
        is_new = server.state is ServerState.ONLINE and server.peer not in chosen
        if is_new and any(missing[block] > 0 for block in server.span):
            chosen[server.peer] = server
            for block in server.span:
                missing[block] -= 1
    return list(chosen.values())
