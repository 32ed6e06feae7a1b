"""Routes by evolution: NSGA-II (Deb et al., 2002), as arXiv 2510.11211 proposes it for choosing servers.

A candidate assigns a server to each block. It has two objectives that contradict each other: the seconds of a step, and
the seconds of its slowest server, which limit how many clients it can serve. Each generation keeps the candidates that
no other beats in both objectives, then those that only these beat, and so on. Within such a front, it prefers
candidates with few neighbors. `python -m benchmarks.routing` compares it with the shortest path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Hop
from shoal.policy.view import SwarmView
from shoal.spans import Span

if TYPE_CHECKING:
    import random

POPULATION = 48
"""Candidates that survive a generation. `python -m benchmarks.routing` measures what these numbers find, how fast."""
GENERATIONS = 40
MUTATION = 0.6
"""The probability that some blocks of a child go to a random server."""

Assignment: TypeAlias = tuple[str, ...]
"""The server that computes each block."""
Objectives: TypeAlias = tuple[float, ...]
"""The smaller, the better."""


def nsga2(
    view: SwarmView,
    span: Span,
    costs: Costs,
    rng: random.Random,
    *,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
) -> tuple[Hop, ...]:
    """Hops that are both quick and evenly loaded. The view must hold every block."""
    holders = view.holders(span)
    if costs.needs.head:
        holders[-1] = [server for server in holders[-1] if server.head]
    peers = [[server.peer for server in here] for here in holders]
    servers = {server.peer: server for here in holders for server in here}

    def hops_of(assignment: Assignment) -> tuple[Hop, ...]:
        hops, start = list[Hop](), span.start
        for peer, blocks in groupby(assignment):
            end = start + len(list(blocks))
            hops.append(Hop(servers[peer], Span(start, end)))
            start = end
        return tuple(hops)

    def objectives(assignment: Assignment) -> Objectives:
        total, sender, load = 0.0, upstream, dict[str, float]()
        for hop in hops_of(assignment):
            cost = costs.hop(hop, sender)
            total += cost.seconds
            load[hop.server.peer] = load.get(hop.server.peer, 0.0) + cost.compute + cost.queue
            sender = hop.server
        return total + costs.link(sender, downstream), max(load.values())

    scores = {each: objectives(each) for each in (_random_assignment(peers, rng) for _ in range(POPULATION))}
    ranked = _ranked(scores)
    for _ in range(GENERATIONS):
        for _ in range(POPULATION):
            one, other = (ranked[min(rng.choices(range(len(ranked)), k=2))] for _ in range(2))
            child = _child(one, other, peers, rng)
            if child not in scores:
                scores[child] = objectives(child)
        ranked = _ranked(scores)[:POPULATION]
        scores = {each: scores[each] for each in ranked}
    return hops_of(_knee(scores))


def _random_assignment(peers: Sequence[Sequence[str]], rng: random.Random) -> Assignment:
    assignment: list[str] = []
    for here in peers:
        stays = assignment and assignment[-1] in here and rng.random() < 0.9
        assignment.append(assignment[-1] if stays else rng.choice(here))
    return tuple(assignment)


def _child(one: Assignment, other: Assignment, peers: Sequence[Sequence[str]], rng: random.Random) -> Assignment:
    """The beginning of one parent and the end of the other; sometimes a random server takes some blocks (mutation)."""
    cut = rng.randrange(len(one) + 1)
    child = list(one[:cut] + other[cut:])
    if rng.random() < MUTATION:
        block = rng.randrange(len(child))
        peer = rng.choice(peers[block])
        first, last = block, block + 1
        while first > 0 and peer in peers[first - 1]:
            first -= 1
        while last < len(child) and peer in peers[last]:
            last += 1
        start, end = rng.randint(first, block), rng.randint(block + 1, last)
        child[start:end] = [peer] * (end - start)
    return tuple(child)


def dominates(one: Objectives, other: Objectives) -> bool:
    """Whether `one` is worse than `other` in no objective, and better in at least one."""
    return one != other and all(mine <= yours for mine, yours in zip(one, other, strict=True))


def fronts(scores: Sequence[Objectives]) -> list[list[int]]:
    """Indices by front: those that no other dominates, then those that only the first front dominates, and so on."""
    found: list[list[int]] = []
    # In this order, none is dominated by a later one.
    for index in sorted(range(len(scores)), key=scores.__getitem__):
        for front in found:
            if not any(dominates(scores[other], scores[index]) for other in reversed(front)):
                front.append(index)
                break
        else:
            found.append([index])
    return found


def crowding(scores: Sequence[Objectives]) -> list[float]:
    """How far each is from its neighbors in a front (the crowding distance of Deb et al.): infinite at the ends."""
    distance = [0.0] * len(scores)
    for objective in range(len(scores[0])):
        order = sorted(range(len(scores)), key=lambda index: scores[index][objective])
        low, high = scores[order[0]][objective], scores[order[-1]][objective]
        distance[order[0]] = distance[order[-1]] = float("inf")
        for left, index, right in zip(order, order[1:], order[2:], strict=False):
            if high > low:
                distance[index] += (scores[right][objective] - scores[left][objective]) / (high - low)
    return distance


def _ranked(scores: Mapping[Assignment, Objectives]) -> list[Assignment]:
    """The best front first; within a front, those with the largest crowding distance first."""
    assignments, ranked = list(scores), list[Assignment]()
    for front in fronts(list(scores.values())):
        distances = crowding([scores[assignments[index]] for index in front])
        order = sorted(zip(front, distances, strict=True), key=lambda each: -each[1])
        ranked.extend(assignments[index] for index, _ in order)
    return ranked


def _knee(scores: Mapping[Assignment, Objectives]) -> Assignment:
    """The one that is nearest to the best of each objective, relative to that best and summed over the objectives."""
    best = [min(values) for values in zip(*scores.values(), strict=True)]
    return min(scores, key=lambda each: sum(value / low for value, low in zip(scores[each], best, strict=True)))
