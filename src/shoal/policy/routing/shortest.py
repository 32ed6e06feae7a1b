"""The fastest route: an exact shortest path over (server, block), forwards through the lattice."""

# S servers of the span, H those that hold a block, F senders worth leaving, T receivers worth entering

from __future__ import annotations

import numpy as np

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.routing.lattice import Array, lattice_of
from shoal.policy.view import SwarmView
from shoal.spans import Span


def shortest(
    view: SwarmView,
    span: Span,
    costs: Costs,
    *,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
) -> tuple[Hop, ...]:
    """The hops with the fewest seconds in sum. The view must hold every block; among equals, its order decides."""
    ways = lattice_of(view, span, costs, upstream=upstream, downstream=downstream)
    links_SS, entry_S, num_servers = ways.links_SS, ways.entry_S, len(ways.servers)
    shortest_to_S, shortest_from_S = links_SS.min(axis=0), links_SS.min(axis=1)

    came_from: list[Array] = []  # for each block and server, the server of the block before on the fastest path
    from_F = np.arange(0)
    seconds_S = ways.first_S + entry_S
    for index, here_H in enumerate(ways.holders):
        sender_S = np.arange(num_servers)
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
        computed_S = np.full(num_servers, np.inf)
        computed_S[here_H] = seconds_S[here_H] + ways.compute_S[here_H]
        seconds_S, from_F = computed_S, here_H
        came_from.append(sender_S)
    current = min(from_F.tolist(), key=lambda each: seconds_S[each] + ways.last_S[each])
    chosen = [current]
    for sender_S in reversed(came_from[1:]):
        chosen.append(int(sender_S[chosen[-1]]))
    return ways.hops(chosen[::-1])
