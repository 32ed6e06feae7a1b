"""Routes that share the work of many clients among the servers, each hardly slower than the fastest route.

While the servers are idle this is the fastest route. When they are busy, many clients that take it hurt each other: a
part of the servers has long queues, and the others have little to do. Announced queues alone do not help, because all
clients see the same old ones, and all go where queues were short. So each client draws its route at random:

1. *Shares.* For each block, which part of all tokens each of its holders should compute, so that all servers are loaded
   in proportion to their speed. Every client computes the same shares from the same view. They do not depend on queues:
   sessions go around in clusters, so at one moment a server has many of them in its queue and at another none. Shares
   that followed the queues sent all clients to where these were short, and got half of the throughput.
2. *A walk* through the blocks that computes each block on a server with the probability of its share, and stays on a
   server for as long as the shares allow (a maximal coupling of the shares of neighboring blocks): servers then
   compute whole spans, and steps make few hops.
3. *A budget.* From each server and block, the fastest way to the end is known. The walk only takes turns after which
   the whole route still takes at most `factor` times as long as the fastest; each server of it may use up its part.
   The longer the queues are, the more even loads gain over short ways, and the larger the factor is.
"""

# S servers of the span, N its blocks, H holders of a block, F senders worth leaving, T receivers worth entering

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shoal.peers import ServerInfo, block_speed_at
from shoal.policy.routing.belief import MOST_GAIN
from shoal.policy.routing.costs import SLOWEST, Costs, Hop
from shoal.policy.routing.lattice import Array, Lattice, lattice_of
from shoal.policy.routing.shortest import shortest
from shoal.policy.view import SwarmView
from shoal.spans import Span

if TYPE_CHECKING:
    import random

FACTORS = (1.5, 2.5)
"""How many times as long as the fastest route a step may be expected to take, with short and with long queues."""
QUEUES = (8.0, 32.0)
"""The mean requests that wait on a server from which on queues are not short, and are long."""
BUSY_REQUESTS = 1.5
"""A server is busy if more requests than this wait there: one may be this client's own."""
BUSY_PART = 1 / 8
"""The servers are busy if this part of them is, or one on the fastest route."""
ROUNDS = 40
"""Rounds in which the shares approach even loads. `python -m benchmarks.routing` measures what that is worth."""


def balanced(
    view: SwarmView,
    span: Span,
    costs: Costs,
    rng: random.Random,
    *,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
) -> tuple[Hop, ...]:
    """The hops of a route that shares the load, or of the fastest one while the servers are idle.

    The view must hold every block. Where a block has a server with room, the others are not used for it, and the route
    is compared with the fastest one over those with room.
    """
    if not _many_are_busy(view, span, costs):
        fastest = shortest(view, span, costs, upstream=upstream, downstream=downstream)
        if not any(_is_busy(hop.server, costs) for hop in fastest):
            return fastest
    full = {server.peer for server in view.servers if costs.no_room(server)}

    def with_room(here: Sequence[ServerInfo]) -> list[ServerInfo]:
        return [server for server in here if server.peer not in full] or list(here)

    ways = lattice_of(
        view,
        span,
        costs,
        upstream=upstream,
        downstream=downstream,
        entry=lambda server: costs.entry(server) - costs.no_room(server),
        may=with_room if full else list,
    )
    left = _seconds_left(ways)
    slack = (factor(_in_span(view, span), costs) - 1) * float((ways.first_S + ways.entry_S + left[0]).min())
    return ways.hops(_walk(ways, left, shares(ways, saturated_speeds(ways.servers, costs)), slack, rng))


def factor(servers: Sequence[ServerInfo], costs: Costs) -> float:
    """How many times as long as the fastest route another one may be expected to take.

    `servers`: those that hold some of the blocks, of which there must be one.
    """
    queue = sum(costs.waiting(server) for server in servers) / len(servers)
    (short, long), (least, most) = QUEUES, FACTORS
    return least + (most - least) * math.log(min(max(queue, short), long) / short) / math.log(long / short)


def _many_are_busy(view: SwarmView, span: Span, costs: Costs) -> bool:
    servers = _in_span(view, span)
    return sum(_is_busy(server, costs) for server in servers) >= max(1.0, BUSY_PART * len(servers))


def _in_span(view: SwarmView, span: Span) -> list[ServerInfo]:
    return [server for server in view.servers if server.span.start < span.end and span.start < server.span.end]


def _is_busy(server: ServerInfo, costs: Costs) -> bool:
    return costs.waiting(server) > BUSY_REQUESTS


def saturated_speeds(servers: Sequence[ServerInfo], costs: Costs) -> Array:
    """The block-tokens per second [S] that each server computes for many sessions, as it announces and was seen.

    If a server has not announced its capacity, all count by their speed for single tokens.
    """
    all_known = all(server.capacity is not None for server in servers)
    speeds = []
    for server in servers:
        length = len(server.span)
        speed = (server.decode_speed or 0.0) * length
        if all_known and server.capacity is not None:
            speed = block_speed_at(server.capacity.block_speeds, length)
            if server.capacity.network_speed is not None:
                speed = min(speed, server.capacity.network_speed * length)
        alone = max((server.decode_speed or 0.0) * length, SLOWEST)
        believed = min(1.0, costs.known.ceiling.decode / alone)  # the part of what it says that is believed
        speed = max(min(speed, MOST_GAIN * alone) * believed, SLOWEST)
        speeds.append(speed / costs.known.slowness.get(server.peer, 1.0))
    return np.array(speeds)


def shares(ways: Lattice, speeds_S: Array) -> Array:
    """The part [N, S] of the tokens of each block that each server should compute.

    Each server has a price, and the holders of a block share it in proportion to their prices. The prices of servers
    that get more than their part of the load fall, until the largest load is as small as it can be.
    """
    may_NS = np.zeros((len(ways.holders), len(ways.servers)))
    for block, here_H in enumerate(ways.holders):
        may_NS[block, here_H] = 1.0
    fair_S = speeds_S / speeds_S.sum() * len(ways.holders)  # the blocks that each would compute of a token
    price_S = fair_S.copy()
    for _ in range(ROUNDS):
        load_S = price_S * ((1 / (may_NS @ price_S)) @ may_NS)
        price_S *= np.sqrt(np.clip(fair_S / load_S, 0.1, 10.0))
        price_S = np.maximum(price_S / price_S.max(), 1e-9)
    weights_NS = may_NS * price_S
    found_NS: Array = weights_NS / weights_NS.sum(axis=1, keepdims=True)
    return found_NS


def _seconds_left(ways: Lattice) -> Array:
    """The seconds [N, S] of the fastest way to the end, from when a server begins to compute a block; infinite where
    it may not."""
    links_SS = ways.links_SS
    shortest_to_S, shortest_from_S = links_SS.min(axis=0), links_SS.min(axis=1)
    left_NS = np.full((len(ways.holders), len(ways.servers)), np.inf)
    for block in range(len(ways.holders) - 1, -1, -1):
        here_H = ways.holders[block]
        if block == len(ways.holders) - 1:
            after_H = ways.last_S[here_H]
        else:
            after_H = left_NS[block + 1, here_H]  # infinite if the server does not compute the next block
            next_T = ways.holders[block + 1]
            entered_T = ways.entry_S[next_T] + left_NS[block + 1, next_T]
            best = entered_T.argmin()
            # A sender is skipped if even its shortest link to the best receiver gains nothing. A receiver is skipped
            # if even its shortest link is worse than the longest one to the best receiver.
            gains_H = shortest_from_S[here_H] + entered_T[best] < after_H
            if gains_H.any():
                from_F = here_H[gains_H]
                latest = entered_T[best] + links_SS[from_F, next_T[best]].max()
                worth_T = entered_T + shortest_to_S[next_T] <= latest
                leaving_FT = links_SS[np.ix_(from_F, next_T[worth_T])] + entered_T[worth_T]
                after_H[gains_H] = np.minimum(after_H[gains_H], leaving_FT.min(axis=1))
        left_NS[block, here_H] = ways.compute_S[here_H] + after_H
    return left_NS


def _walk(ways: Lattice, left_NS: Array, share_NS: Array, slack: float, rng: random.Random) -> list[int]:
    """The server that computes each block: drawn by the shares, on a route that loses `slack` seconds at most."""
    num_blocks = len(ways.holders)
    total_S = ways.first_S + ways.entry_S + left_NS[0]
    part_S = np.array([min(server.span.end, ways.span.end) - ways.span.start for server in ways.servers]) / num_blocks
    chosen: list[int] = []
    used, allowed = 0.0, 0.0  # of the slack
    for block, here_H in enumerate(ways.holders):
        if chosen:
            current = chosen[-1]
            fastest = float(left_NS[block - 1, current] - ways.compute_S[current])
            lost_H = ways.links_SS[current, here_H] + ways.entry_S[here_H] + left_NS[block, here_H] - fastest
            lost_H = np.where(here_H == current, left_NS[block, current] - fastest, lost_H)
        else:
            current = -1
            lost_H = total_S[here_H] - total_S.min()
        may_H = used + lost_H <= np.maximum(allowed, slack * part_S[here_H])
        may_H[lost_H.argmin()] = True  # the fastest way on, whatever rounding says
        at = _draw(here_H, may_H, current, share_NS[block], share_NS[block - 1] if chosen else None, rng)
        index = int(here_H[at])
        used += max(0.0, float(lost_H[at]))
        allowed = max(allowed, slack * float(part_S[index]), used)
        chosen.append(index)
    return chosen


def _draw(here_H: Array, may_H: Array, current: int, share_S: Array, before_S: Array | None, rng: random.Random) -> int:
    """Which of the holders of a block computes it, as its position among them."""
    share_H = share_S[here_H] * may_H
    if before_S is None:
        return _weighted(share_H, may_H, rng)
    grows_H = np.maximum(share_S[here_H] - before_S[here_H], 0.0) * may_H
    is_current_H = here_H == current
    stays = bool((may_H & is_current_H).any())
    others_H = may_H & ~is_current_H
    if stays:
        keeps = rng.random() * float(before_S[current]) <= float(share_S[current])
        grows_H[is_current_H] = 0.0
        if keeps or not grows_H.any():
            return int(is_current_H.argmax())
        return _weighted(grows_H, others_H, rng)
    return _weighted(grows_H if grows_H.any() else share_H, may_H, rng)


def _weighted(weights_H: Array, may_H: Array, rng: random.Random) -> int:
    """A position, drawn in proportion to its weight; any that is allowed if no weight is."""
    if not weights_H.any():
        weights_H = may_H.astype(float)
    sums_H = weights_H.cumsum()
    return int(min(np.searchsorted(sums_H, rng.random() * sums_H[-1], side="right"), weights_H.nonzero()[0][-1]))
