"""Which servers are pinged before a route is chosen, and which may be used without an answer.

What a server announces of itself is a claim: a speed of 1e9 costs nothing to announce. So before each choice the client
pings the best of the servers that have never answered it, and chooses among the servers that did. Servers that hold a
block alone are used in any case. `client/swarm/server_probe.py` does the pinging.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs
from shoal.policy.view import SwarmView
from shoal.spans import Span

RANDOM_FRACTION = 4
"""One in four pinged servers is chosen at random: else the boldest claims would fill all rounds."""


def sole_holders(view: SwarmView, span: Span) -> frozenset[str]:
    """The servers that hold some block of a span alone: every route goes over them, whether they answer or not."""
    return frozenset(holders[0].peer for holders in view.holders(span) if len(holders) == 1)


def servers_to_probe(
    view: SwarmView, span: Span, costs: Costs, *, known: Collection[str], most: int
) -> tuple[ServerInfo, ...]:
    """At most `most` servers to ping next, without those that are `known`: the best of each block, and some at random.

    The blocks take turns. The order of the view, which is random, decides which others are pinged.
    """
    holders = [[server for server in here if server.peer not in known] for here in view.holders(span)]
    if costs.needs.head and span.end == view.num_blocks and holders and any(server.head for server in holders[-1]):
        holders[-1] = [server for server in holders[-1] if server.head]
    strangers = {server.peer: server for here in holders for server in here}
    at_random = [server for server in view.servers if server.peer in strangers]
    seconds = {peer: _seconds_per_block(server, span, costs) for peer, server in strangers.items()}
    best = _in_turns([sorted(here, key=lambda server: seconds[server.peer]) for here in holders])
    chosen: dict[str, ServerInfo] = {}
    for server in best:
        if len(chosen) >= most - most // RANDOM_FRACTION:
            break
        chosen[server.peer] = server
    for server in at_random:
        if len(chosen) >= most:
            break
        chosen[server.peer] = server
    return tuple(chosen.values())


def _seconds_per_block(server: ServerInfo, span: Span, costs: Costs) -> float:
    """What a block costs on a server, if all blocks of the span that it holds are computed there."""
    num_blocks = min(span.end, server.span.end) - max(span.start, server.span.start)
    return costs.block(server) + (costs.entry(server) + costs.reach(server)) / num_blocks


def _in_turns(lists: list[list[ServerInfo]]) -> Iterator[ServerInfo]:
    """The first of each list, then the second of each, and so on."""
    for index in range(max(map(len, lists), default=0)):
        for each in lists:
            if index < len(each):
                yield each[index]
