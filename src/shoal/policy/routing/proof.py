"""Which servers a route may go over: those that have answered, and those without which there is none.

What a server announces of itself is a claim: a speed of 1e9 costs nothing to say. So before a choice the best of the
servers that have never answered a ping are asked, and the choice is among those that did. Decisions only;
`client/meeting.py` asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs
from shoal.policy.view import SwarmView
from shoal.spans import Span

BY_CHANCE = 4
"""One in so many of those that are asked is chosen by chance: else those that claim most would be asked for ever."""


def without_choice(view: SwarmView, span: Span) -> frozenset[str]:
    """The servers that hold some block of a span alone: a route has to go over them, whether they answer or not."""
    return frozenset(holders[0].peer for holders in view.holders(span) if len(holders) == 1)


def to_ask(view: SwarmView, span: Span, costs: Costs, *, known: Collection[str], most: int) -> tuple[ServerInfo, ...]:
    """Who is asked next, of those that are not `known` already: for each block in turn the best, and some by chance.

    Chance is the order of the view.
    """
    holders = [[server for server in here if server.peer not in known] for here in view.holders(span) if len(here) > 1]
    if costs.needs.head and span.end == view.num_blocks and holders and any(server.head for server in holders[-1]):
        holders[-1] = [server for server in holders[-1] if server.head]
    strangers = {server.peer: server for here in holders for server in here}
    by_chance = [server for server in view.servers if server.peer in strangers]
    seconds = {peer: _seconds_a_block(server, span, costs) for peer, server in strangers.items()}
    best = _in_turns([sorted(here, key=lambda server: seconds[server.peer]) for here in holders])
    chosen: dict[str, ServerInfo] = {}
    for server in best:
        if len(chosen) >= most - most // BY_CHANCE:
            break
        chosen[server.peer] = server
    for server in by_chance:
        if len(chosen) >= most:
            break
        chosen[server.peer] = server
    return tuple(chosen.values())


def _seconds_a_block(server: ServerInfo, span: Span, costs: Costs) -> float:
    """What a block costs there, if all are used that it holds."""
    num_blocks = min(span.end, server.span.end) - max(span.start, server.span.start)
    return costs.block(server) + (costs.entry(server) + costs.reach(server)) / num_blocks


def _in_turns(lists: list[list[ServerInfo]]) -> Iterator[ServerInfo]:
    """The first of each, then the second of each, and so on."""
    for index in range(max(map(len, lists), default=0)):
        for each in lists:
            if index < len(each):
                yield each[index]
