"""The throughput of a placement: as the paper counts it, and as servers can share their time.

M machines, N blocks, K levels of throughput.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.policy.machines.fleet import Floats
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.sharing import shared_throughput


def block_throughputs(machines: Sequence[Machine], num_blocks: int) -> list[float]:
    """Tokens per second of each block, each machine dividing its time evenly (the paper's `t_i`). Their least is "min".

    All machines that have a span count; leave out those that are loading for what the swarm carries now.
    """
    change = np.zeros(num_blocks + 1)
    for machine in machines:
        if machine.span is not None:
            speed = machine.speed(len(machine.span)) * machine.count
            change[machine.span.start] += speed
            change[machine.span.end] -= speed
    total = np.cumsum(change)[:-1]
    covered = _covered(machines, num_blocks)
    return [float(value) if held else 0.0 for value, held in zip(total, covered, strict=True)]


def _covered(machines: Sequence[Machine], num_blocks: int) -> list[bool]:
    """Which blocks have a machine: sums of speeds leave rounding errors where there is none."""
    change = np.zeros(num_blocks + 1, np.int64)
    for machine in machines:
        if machine.span is not None:
            change[machine.span.start] += 1
            change[machine.span.end] -= 1
    return [bool(held) for held in np.cumsum(change)[:-1] > 0]


def exact_throughput(machines: Sequence[Machine], num_blocks: int) -> float:
    """Tokens per second through all blocks, if machines share their time freely among their blocks.

    It is the most that every block can get at once, whatever limits the machines.
    """
    if not all(_covered(machines, num_blocks)):
        return 0.0
    fields = _placed(machines)
    return shared_throughput(fields, num_blocks, at_most=_most(fields, num_blocks))


def _placed(machines: Sequence[Machine]) -> Floats:
    """Start, end, capacity and network of the machines that have a span, by the ends of their spans. [M, 4]

    Machines that are alike are one row: they can share equally what they do together.
    """
    counts: dict[tuple[int, int, float, float], int] = {}
    for machine in machines:
        if machine.span is not None:
            capacity = machine.speed(len(machine.span)) * len(machine.span)
            row = (machine.span.end, machine.span.start, capacity, machine.network_speed)
            counts[row] = counts.get(row, 0) + machine.count
    rows = [
        (start, end, capacity * count, network * count)
        for (end, start, capacity, network), count in sorted(counts.items())
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def _most(fields: Floats, num_blocks: int) -> float:
    """What the machines of the weakest block carry if they compute that block alone, or all machines all blocks."""
    starts, ends, capacity, network = fields.T
    change = np.zeros(num_blocks + 1)
    alone = np.minimum(capacity, network)
    np.add.at(change, starts.astype(int), alone)
    np.subtract.at(change, ends.astype(int), alone)
    return min(float(np.cumsum(change)[:-1].min()), float(capacity.sum()) / num_blocks)


def served(fields: Floats, num_blocks: int, levels: Floats) -> Floats:
    """Tokens per second that each block gets at each level, never above it. [K, N]

    From the first block to the last, each is served by the machines that hold it whose spans end first: the others can
    still help later. No other order serves more in all, unless networks limit what machines do for one block.
    """
    starts, ends, capacity, network = fields.T
    left = np.broadcast_to(capacity, (len(levels), len(capacity))).copy()  # [K, M]
    result = np.zeros((len(levels), num_blocks))
    for block in range(num_blocks):
        here = np.flatnonzero((starts <= block) & (block < ends))
        if len(here) == 0:
            continue
        offered = np.minimum(left[:, here], network[here])
        reached = np.minimum(np.cumsum(offered, axis=1), levels[:, None])
        left[:, here] -= np.diff(reached, axis=1, prepend=0.0)
        result[:, block] = reached[:, -1]
    return result
