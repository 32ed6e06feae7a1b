"""Which servers are pinged before a route is chosen, and which may be used without an answer.

What a server announces of itself is a claim: a speed of 1e9 costs nothing to announce. So before each choice the client
pings servers that have never answered it, and chooses among the servers that did. First come those of the best routes:
the route that would be taken if all claims were true, the best one without its servers, and so on. Servers that hold a
block alone are used in any case. `client/swarm/known/server_probe.py` does the pinging.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs
from shoal.policy.routing.shortest import shortest
from shoal.policy.view import SwarmView
from shoal.spans import Span

RANDOM_FRACTION = 4
"""One in four pinged servers is chosen at random: else the boldest claims would fill all rounds."""
MOST_ROUTES = 8
"""How many routes are searched for their servers; each search takes some milliseconds."""
MOST_SEARCHED = 128
"""The servers among which these routes are searched: the best of each block."""


def sole_holders(view: SwarmView, span: Span) -> frozenset[str]:
    """The servers that hold some block of a span alone: every route goes over them, whether they answer or not."""
    return frozenset(holders[0].peer for holders in view.holders(span) if len(holders) == 1)


def servers_to_probe(
    view: SwarmView, span: Span, costs: Costs, *, proven: Collection[str], silent: Collection[str] = (), most: int
) -> tuple[ServerInfo, ...]:
    """At most `most` servers to ping next, neither `proven` ones nor those that were `silent` lately.

    Those of the best routes come first, then the best of each block in turns, and some at random. The routes may go
    over proven servers too: what these lack is what is looked for. The order of the view, which is random, decides
    which others are pinged.
    """
    seconds = {server.peer: _seconds_per_block(server, span, costs) for server in _in_span(view, span)}
    heads = costs.needs.head and span.end == view.num_blocks
    holders = [
        sorted((server for server in here if server.peer not in silent), key=lambda server: seconds[server.peer])
        for here in view.holders(span)
    ]
    if heads and any(server.head for server in holders[-1]):
        holders[-1] = [server for server in holders[-1] if server.head]
    ranked = {server.peer: server for server in _in_turns(holders)}
    strangers = {peer: server for peer, server in ranked.items() if peer not in proven}
    num_best = most - most // RANDOM_FRACTION
    chosen: dict[str, ServerInfo] = {}
    rest = replace(view, servers=tuple(ranked.values())[:MOST_SEARCHED])
    for _ in range(MOST_ROUTES):
        if len(chosen) >= num_best or rest.missing(span) or (heads and not rest.offers_head(span.end - 1)):
            break
        new = {hop.server.peer: hop.server for hop in shortest(rest, span, costs) if hop.server.peer in strangers}
        if not new:
            break  # what is known is better than all claims
        chosen |= new
        rest = replace(rest, servers=tuple(server for server in rest.servers if server.peer not in new))
    at_random = [server for server in view.servers if server.peer in strangers]
    for limit, servers in ((num_best, strangers.values()), (most, at_random)):
        for server in servers:
            if len(chosen) >= limit:
                break
            chosen[server.peer] = server
    return tuple(chosen.values())[:most]


def _in_span(view: SwarmView, span: Span) -> list[ServerInfo]:
    return [server for server in view.servers if server.span.start < span.end and span.start < server.span.end]


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
