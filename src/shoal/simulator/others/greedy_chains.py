"""GBP-CR: greedy block placement with cache reservation, the successor of BPRR (arXiv 2604.14993 and 2512.21884).

Every server reserves memory for the caches of c sessions, which limits its blocks. Servers are sorted by the seconds
that a block takes on them, the network included, and form one chain after another: each takes the next blocks, and the
last of a chain takes the last ones. The reservation c is chosen by trying. Servers that do not complete a chain are
left out there; here they join where the swarm is weakest.

A machine's profile does not say how many caches fit beside its blocks. So what is tried is the part of the most blocks
that servers use, and the best is that with the highest exact throughput.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import exact_throughput
from shoal.spans import Span

PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Parts of the most blocks that are tried."""


def greedy_chains(machines: Sequence[Machine], num_blocks: int) -> dict[str, Span]:
    """The spans of the servers in chains."""
    best: dict[str, Span] = {}
    speed = -1.0
    for part in PARTS:
        spans = _chains(machines, num_blocks, part)
        placed = [replace(machine, span=spans[machine.peer]) for machine in machines if machine.peer in spans]
        found = exact_throughput(placed, num_blocks) if placed else 0.0
        if found > speed:
            best, speed = spans, found
    return best


def _chains(machines: Sequence[Machine], num_blocks: int, part: float) -> dict[str, Span]:
    lengths = {machine.peer: max(1, min(num_blocks, int(machine.max_blocks * part))) for machine in machines}
    fastest = sorted(machines, key=lambda each: (1 / (each.speed(lengths[each.peer]) * lengths[each.peer]), each.peer))
    spans: dict[str, Span] = {}
    chain: dict[str, Span] = {}
    start = 0
    for machine in fastest:
        length = lengths[machine.peer]
        first = min(start, num_blocks - length)
        chain[machine.peer] = Span(first, first + length)
        start = first + length
        if start == num_blocks:
            spans |= chain
            chain, start = {}, 0
    return spans
