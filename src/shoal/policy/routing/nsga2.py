"""Chains by evolution: NSGA-II (Deb et al., 2002), as arXiv 2510.11211 proposes it for choosing servers.

A chain has two objectives that contradict each other: the seconds of a step, and the seconds of its slowest server, on
which depends how many clients it can bear. A generation keeps the chains that no other beats in both, then those that
only they beat, and so on, and prefers those that have few neighbours. `benchmarks/routing.py` compares it with the
shortest path.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.view import SwarmView
from shoal.spans import Span

POPULATION = 48
GENERATIONS = 40
MUTATION = 0.6
"""How likely a child is that differs from what its parents have given it."""

Chain: TypeAlias = tuple[str, ...]
"""The server that computes each block."""
Objectives: TypeAlias = tuple[float, ...]
"""All to be as small as can be."""


def nsga2(
    view: SwarmView,
    span: Span,
    costs: Costs,
    *,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
    seed: int = 0,
) -> tuple[Hop, ...]:
    """A chain that is both quick and even; the view must hold every block. The same seed finds the same."""
    chance = random.Random(seed)  # noqa: S311 - nothing secret
    holders = view.holders(span)
    if costs.needs.head:
        holders[-1] = [server for server in holders[-1] if server.head]
    peers = [[server.peer for server in here] for here in holders]
    servers = {server.peer: server for here in holders for server in here}

    def hops_of(chain: Chain) -> tuple[Hop, ...]:
        hops, start = list[Hop](), span.start
        for peer, blocks in groupby(chain):
            end = start + len(list(blocks))
            hops.append(Hop(servers[peer], Span(start, end)))
            start = end
        return tuple(hops)

    def objectives(chain: Chain) -> Objectives:
        total, sender, load = 0.0, upstream, dict[str, float]()
        for hop in hops_of(chain):
            cost = costs.hop(hop, sender)
            total += cost.seconds
            load[hop.server.peer] = load.get(hop.server.peer, 0.0) + cost.compute + cost.queue
            sender = hop.server
        return total + costs.link(sender, downstream), max(load.values())

    scores = {chain: objectives(chain) for chain in (_random_chain(peers, chance) for _ in range(POPULATION))}
    ranked = _ranked(scores)
    for _ in range(GENERATIONS):
        for _ in range(POPULATION):
            one, other = (ranked[min(chance.choices(range(len(ranked)), k=2))] for _ in range(2))
            child = _child(one, other, peers, chance)
            if child not in scores:
                scores[child] = objectives(child)
        ranked = _ranked(scores)[:POPULATION]
        scores = {chain: scores[chain] for chain in ranked}
    return hops_of(_knee(scores))


def _random_chain(peers: Sequence[Sequence[str]], chance: random.Random) -> Chain:
    chain: list[str] = []
    for here in peers:
        stays = chain and chain[-1] in here and chance.random() < 0.9
        chain.append(chain[-1] if stays else chance.choice(here))
    return tuple(chain)


def _child(one: Chain, other: Chain, peers: Sequence[Sequence[str]], chance: random.Random) -> Chain:
    """The beginning of one chain and the end of another; sometimes some blocks in the middle go to somebody else."""
    cut = chance.randrange(len(one) + 1)
    child = list(one[:cut] + other[cut:])
    if chance.random() < MUTATION:
        block = chance.randrange(len(child))
        peer = chance.choice(peers[block])
        first, last = block, block + 1
        while first > 0 and peer in peers[first - 1]:
            first -= 1
        while last < len(child) and peer in peers[last]:
            last += 1
        start, end = chance.randint(first, block), chance.randint(block + 1, last)
        child[start:end] = [peer] * (end - start)
    return tuple(child)


def dominates(one: Objectives, other: Objectives) -> bool:
    """Whether it is nowhere worse and somewhere better."""
    return one != other and all(mine <= yours for mine, yours in zip(one, other, strict=True))


def fronts(scores: Sequence[Objectives]) -> list[list[int]]:
    """The indices of those that nobody dominates; of those that only these dominate; and so on."""
    found: list[list[int]] = []
    # In this order, nobody is dominated by those that come later.
    for index in sorted(range(len(scores)), key=scores.__getitem__):
        for front in found:
            if not any(dominates(scores[other], scores[index]) for other in reversed(front)):
                front.append(index)
                break
        else:
            found.append([index])
    return found


def crowding(scores: Sequence[Objectives]) -> list[float]:
    """How far each is from its neighbours in a front: the more the better, infinitely at its ends."""
    distance = [0.0] * len(scores)
    for objective in range(len(scores[0])):
        order = sorted(range(len(scores)), key=lambda index: scores[index][objective])
        low, high = scores[order[0]][objective], scores[order[-1]][objective]
        distance[order[0]] = distance[order[-1]] = float("inf")
        for left, index, right in zip(order, order[1:], order[2:], strict=False):
            if high > low:
                distance[index] += (scores[right][objective] - scores[left][objective]) / (high - low)
    return distance


def _ranked(scores: Mapping[Chain, Objectives]) -> list[Chain]:
    """The best front first, and in a front those first that have few neighbours."""
    chains, ranked = list(scores), list[Chain]()
    for front in fronts(list(scores.values())):
        distances = crowding([scores[chains[index]] for index in front])
        order = sorted(zip(front, distances, strict=True), key=lambda each: -each[1])
        ranked.extend(chains[index] for index, _ in order)
    return ranked


def _knee(scores: Mapping[Chain, Objectives]) -> Chain:
    """Of those that nobody dominates the one that is, all in all, relatively nearest to the best of each objective."""
    best = [min(values) for values in zip(*scores.values(), strict=True)]
    return min(scores, key=lambda chain: sum(value / low for value, low in zip(scores[chain], best, strict=True)))
