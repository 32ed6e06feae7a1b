"""The shortest path as it was before it was made quick: the route that the quick one must find too."""

# S servers of the span, H those that hold a block, F senders worth leaving, T receivers worth entering

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.view import SwarmView
from shoal.spans import Span

_Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def slow_shortest(
    view: SwarmView,
    span: Span,
    costs: Costs,
    *,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
) -> tuple[Hop, ...]:
    """The hops with the fewest seconds in sum. The view must hold every block; among equals, its order decides."""
    holders = view.holders(span)
    if costs.needs.head:
        holders[-1] = [server for server in holders[-1] if server.head]
    servers = list({server.peer: server for here in holders for server in here}.values())
    index_of = {server.peer: index for index, server in enumerate(servers)}
    compute_S = np.array([costs.block(server) for server in servers])
    entry_S = np.array([costs.entry(server) for server in servers])
    links_SS = np.array([[costs.link(one, other) for other in servers] for one in servers])
    shortest_to_S, shortest_from_S = links_SS.min(axis=0), links_SS.min(axis=1)

    came_from: list[_Array] = []  # for each block and server, the server of the block before on the fastest path
    from_F = np.arange(0)
    seconds_S = np.array([costs.link(upstream, server) for server in servers]) + entry_S
    for index, here in enumerate(holders):
        sender_S = np.arange(len(servers))
        here_H = np.array([index_of[server.peer] for server in here])
        if index:
            # A receiver is skipped if even its shortest link from the best sender gains nothing. A sender is skipped
            # if even its shortest link arrives after the best sender's longest link.
            best = from_F[seconds_S[from_F].argmin()]
            to_T = here_H[seconds_S[best] + shortest_to_S[here_H] + entry_S[here_H] < seconds_S[here_H]]
            if len(to_T):
                latest = seconds_S[best] + links_SS[best, to_T].max()
                from_F = from_F[seconds_S[from_F] + shortest_from_S[from_F] <= latest]
                arrival_FT = seconds_S[from_F, None] + links_SS[np.ix_(from_F, to_T)]
                first_T = arrival_FT.argmin(axis=0)
                arrival_T = arrival_FT[first_T, np.arange(len(to_T))] + entry_S[to_T]
                is_sooner_T = arrival_T < seconds_S[to_T]
                sender_S[to_T] = np.where(is_sooner_T, from_F[first_T], to_T)
                seconds_S[to_T] = np.where(is_sooner_T, arrival_T, seconds_S[to_T])
        computed_S = np.full(len(servers), np.inf)
        computed_S[here_H] = seconds_S[here_H] + compute_S[here_H]
        seconds_S, from_F = computed_S, here_H
        came_from.append(sender_S)
    last = min(from_F.tolist(), key=lambda each: seconds_S[each] + costs.link(servers[each], downstream))
    return _hops(servers, came_from, last, span)


def _hops(servers: list[ServerInfo], came_from: list[_Array], last: int, span: Span) -> tuple[Hop, ...]:
    hops: list[Hop] = []
    end, current = span.end, last
    for block in range(span.end - 1, span.start - 1, -1):
        sender = int(came_from[block - span.start][current])
        if sender != current or block == span.start:
            hops.append(Hop(servers[current], Span(block, end)))
            end, current = block, sender
    return tuple(reversed(hops))
