"""The ways through a span: which servers may compute each block, and what everything costs, as arrays.

block             0       1       2       3
server A  0:3     o ───── o ───── o           an edge to the right computes a block,
                               ╲       ╲          an edge down enters another server
server B  1:4              o ───── o ───── o

Any server may follow any other at any block. A thousand servers have millions of edges.
"""

# S servers of the span, H those that may compute a block

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.view import SwarmView
from shoal.spans import Span

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Lattice:
    """A span, its `servers`, and the seconds of everything.

    `holders` has for each block the indices [H] of the servers that may compute it. `compute_S` is one block on a
    server, `entry_S` what entering it costs without the link, `links_SS` from each server to each other one, `first_S`
    from the client or the server before the span, and `last_S` to the client or the server behind it.
    """

    span: Span
    servers: tuple[ServerInfo, ...]
    holders: tuple[Array, ...]
    compute_S: Array
    entry_S: Array
    links_SS: Array
    first_S: Array
    last_S: Array

    def hops(self, chosen: Sequence[int]) -> tuple[Hop, ...]:
        """The hops of a route on which the server of this index computes each block."""
        hops, start = list[Hop](), self.span.start
        for block, index in enumerate(chosen, start=self.span.start):
            following = chosen[block + 1 - self.span.start] if block + 1 < self.span.end else None
            if following != index:
                hops.append(Hop(self.servers[index], Span(start, block + 1)))
                start = block + 1
        return tuple(hops)


def lattice_of(
    view: SwarmView,
    span: Span,
    costs: Costs,
    *,
    upstream: ServerInfo | None,
    downstream: ServerInfo | None,
    entry: Callable[[ServerInfo], float] | None = None,
    may: Callable[[Sequence[ServerInfo]], list[ServerInfo]] = list,
) -> Lattice:
    """The ways over a view that holds every block of a span.

    `entry` replaces what entering a server costs, and `may` chooses among the holders of a block.
    """
    holders = view.holders(span)
    if costs.needs.head:
        holders[-1] = [server for server in holders[-1] if server.head]
    holders = [may(here) for here in holders]
    servers = tuple({server.peer: server for here in holders for server in here}.values())
    index_of = {server.peer: index for index, server in enumerate(servers)}
    return Lattice(
        span,
        servers,
        tuple(np.array([index_of[server.peer] for server in here]) for here in holders),
        compute_S=np.array([costs.block(server) for server in servers]),
        entry_S=np.array([(entry or costs.entry)(server) for server in servers]),
        links_SS=_links(servers, index_of, costs),
        first_S=np.array([costs.link(upstream, server) for server in servers]),
        last_S=np.array([costs.link(server, downstream) for server in servers]),
    )


def _links(servers: Sequence[ServerInfo], index_of: dict[str, int], costs: Costs) -> Array:
    """The seconds [S, S] from each server to each other one."""
    leave_S = np.array([costs.leave(server) for server in servers])
    reach_S = np.array([costs.reach(server) for server in servers])
    links_SS: Array = leave_S[:, None] + reach_S
    np.minimum(links_SS, costs.unknown_link, out=links_SS)  # in place: these are the largest arrays
    np.maximum(links_SS, abs(leave_S[:, None] - reach_S), out=links_SS)
    known = [
        (index_of[sender], index, seconds)
        for receiver, index in index_of.items()
        for sender, seconds in costs.known_links.get(receiver, {}).items()
        if sender in index_of
    ]
    if known:
        senders, receivers, seconds = zip(*known, strict=True)
        links_SS[list(senders), list(receivers)] = seconds
    return links_SS
