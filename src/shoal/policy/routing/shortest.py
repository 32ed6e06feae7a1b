"""The fastest route: an exact shortest path over (server, block).

    block             0       1       2       3
    server A  0:3     o ───── o ───── o           an edge to the right computes a block,
                               ╲       ╲          an edge down enters another server
    server B  1:4              o ───── o ───── o

Any server may follow any other at any block. A thousand servers have millions of edges, which are arrays here. Most of
them are never looked at: senders come in the order of their times, and the rest is skipped once even the shortest link
from the next sender arrives later than what was found.
"""

# S servers of the span, H those that hold a block, F senders worth leaving, T receivers worth entering

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.view import SwarmView
from shoal.spans import Span

_Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

SENDERS_AT_ONCE = 64
"""The senders that are compared in one operation: few, because usually the earliest ones win."""


def shortest(
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
    links_SS = costs.links(servers)
    shortest_to_S, shortest_from_S = links_SS.min(axis=0), links_SS.min(axis=1)

    came_from: list[_Array] = []  # for each block and server, the server of the block before on the fastest path
    from_F = np.arange(0)
    seconds_S = np.array([costs.link(upstream, server) for server in servers]) + entry_S
    for index, here in enumerate(holders):
        sender_S = np.arange(len(servers))
        here_H = np.fromiter((index_of[server.peer] for server in here), int, len(here))
        if index:
            # A receiver is skipped if even its shortest link from the best sender gains nothing.
            best = seconds_S[from_F].min()
            to_T = here_H[best + shortest_to_S[here_H] + entry_S[here_H] < seconds_S[here_H]]
            if len(to_T):
                arrival_T, first_T = _arrivals(seconds_S, from_F, to_T, links_SS, shortest_from_S)
                arrival_T += entry_S[to_T]
                is_sooner_T = arrival_T < seconds_S[to_T]
                sender_S[to_T] = np.where(is_sooner_T, first_T, to_T)
                seconds_S[to_T] = np.where(is_sooner_T, arrival_T, seconds_S[to_T])
        computed_S = np.full(len(servers), np.inf)
        computed_S[here_H] = seconds_S[here_H] + compute_S[here_H]
        seconds_S, from_F = computed_S, here_H
        came_from.append(sender_S)
    last = min(from_F.tolist(), key=lambda each: seconds_S[each] + costs.link(servers[each], downstream))
    return _hops(servers, came_from, last, span)


def _arrivals(
    seconds_S: _Array, from_F: _Array, to_T: _Array, links_SS: _Array, shortest_from_S: _Array
) -> tuple[_Array, _Array]:
    """When each receiver can be reached from any sender, and from which; among equals, from the first in `from_F`."""
    rank_S = np.empty(len(seconds_S), dtype=int)
    rank_S[from_F] = np.arange(len(from_F))
    order_F = from_F[np.argsort(seconds_S[from_F], kind="stable")]
    earliest_F = np.minimum.accumulate((seconds_S + shortest_from_S)[order_F][::-1])[::-1]
    arrival_T = np.full(len(to_T), np.inf)
    first_T = np.zeros(len(to_T), dtype=int)
    for start in range(0, len(order_F), SENDERS_AT_ONCE):
        if earliest_F[start] > arrival_T.max():
            break
        senders = order_F[start : start + SENDERS_AT_ONCE]
        senders = senders[np.argsort(rank_S[senders])]
        arrival_FT = seconds_S[senders, None] + links_SS[senders[:, None], to_T]
        row_T = arrival_FT.argmin(axis=0)
        here_T = arrival_FT[row_T, np.arange(len(to_T))]
        here_first_T = senders[row_T]
        is_better_T = (here_T < arrival_T) | ((here_T == arrival_T) & (rank_S[here_first_T] < rank_S[first_T]))
        arrival_T = np.where(is_better_T, here_T, arrival_T)
        first_T = np.where(is_better_T, here_first_T, first_T)
    return arrival_T, first_T


def _hops(servers: list[ServerInfo], came_from: list[_Array], last: int, span: Span) -> tuple[Hop, ...]:
    hops: list[Hop] = []
    end, current = span.end, last
    for block in range(span.end - 1, span.start - 1, -1):
        sender = int(came_from[block - span.start][current])
        if sender != current or block == span.start:
            hops.append(Hop(servers[current], Span(block, end)))
            end, current = block, sender
    return tuple(reversed(hops))
