"""The fastest route: an exact shortest path over (server, block), forwards through the lattice.

Most edges are never looked at: senders come in the order of their times, and the rest is skipped once even the shortest
link from the next sender arrives later than what was found.
"""

# S servers of the span, H those that hold a block, F senders worth leaving, T receivers worth entering

from __future__ import annotations

import numpy as np

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.routing.lattice import Array, lattice_of
from shoal.policy.view import SwarmView
from shoal.spans import Span

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
    ways = lattice_of(view, span, costs, upstream=upstream, downstream=downstream)
    links_SS, entry_S, num_servers = ways.links_SS, ways.entry_S, len(ways.servers)
    shortest_to_S, shortest_from_S = links_SS.min(axis=0), links_SS.min(axis=1)

    came_from: list[Array] = []  # for each block and server, the server of the block before on the fastest path
    from_F = np.arange(0)
    seconds_S = ways.first_S + entry_S
    for index, here_H in enumerate(ways.holders):
        sender_S = np.arange(num_servers)
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
        computed_S = np.full(num_servers, np.inf)
        computed_S[here_H] = seconds_S[here_H] + ways.compute_S[here_H]
        seconds_S, from_F = computed_S, here_H
        came_from.append(sender_S)
    current = min(from_F.tolist(), key=lambda each: seconds_S[each] + ways.last_S[each])
    chosen = [current]
    for sender_S in reversed(came_from[1:]):
        chosen.append(int(sender_S[chosen[-1]]))
    return ways.hops(chosen[::-1])


def _arrivals(
    seconds_S: Array, from_F: Array, to_T: Array, links_SS: Array, shortest_from_S: Array
) -> tuple[Array, Array]:
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
