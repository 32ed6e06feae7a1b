"""How much all blocks can get at once from machines whose networks limit what each does for a single block.

It is a flow from machines to blocks: a machine gives at most its capacity in all, and at most what its network carries
to each block. By the theorem of Gale, every block can get λ if and only if no set S of blocks is too poor:
λ |S| ≤ Σ_m min(C_m, n_m |S ∩ span_m|). So λ is lowered to what the poorest set that was found allows, until the flow
reaches it. M machines, N blocks.
"""

from __future__ import annotations

import numpy as np

from shoal.policy.machines.fleet import Flags, Floats, Ints

PRECISION = 1e-7


def shared_throughput(fields: Floats, num_blocks: int, *, at_most: float) -> float:
    """The most that every block can get at once, up to `at_most`. `fields` are start, end, capacity, network. [M, 4]"""
    starts, ends, capacity, network = fields.T
    blocks = np.arange(num_blocks)
    inside = (starts[:, None] <= blocks) & (blocks < ends[:, None])
    limit = np.where(inside, np.minimum(capacity, network)[:, None], 0.0)
    level = at_most
    flow = _first_flow(limit, capacity, ends, level)
    while level > 0:
        poor = _fill(flow, limit, capacity, level)
        if poor is None:
            break
        lower = float(np.minimum(capacity, limit[:, poor].sum(axis=1)).sum()) / int(poor.sum())
        if lower >= level * (1 - PRECISION):
            break
        flow *= lower / level
        level = lower
    return level


def _first_flow(limit: Floats, capacity: Floats, ends: Floats, level: float) -> Floats:
    """What each machine gives to each block if earlier blocks and machines whose spans end first come first. [M, N]"""
    flow = np.zeros_like(limit)
    order = np.argsort(ends, kind="stable")
    left = capacity[order]
    for block in range(limit.shape[1]):
        reached = np.minimum(np.cumsum(np.minimum(left, limit[order, block])), level)
        given = np.diff(reached, prepend=0.0)
        left -= given
        flow[order, block] = given
    return flow


def _fill(flow: Floats, limit: Floats, capacity: Floats, level: float) -> Flags | None:
    """Raise the flow until every block gets `level`; else the blocks of a set that is too poor, as a mask. [N]"""
    least = level * PRECISION
    left, lacking = capacity - flow.sum(axis=1), level - flow.sum(axis=0)
    while (lacking > least).any():
        path = _path(flow, limit, left > least, lacking > least, least)
        if not isinstance(path, tuple):
            return path
        givers, takers = path  # a giver gives a taker more; what it lacks for that, its last taker gives up
        room = (limit[givers, takers] - flow[givers, takers]).min()
        given_up = flow[givers[1:], takers[:-1]].min(initial=np.inf)
        amount = min(room, given_up, left[givers[0]], lacking[takers[-1]])
        flow[givers, takers] += amount
        flow[givers[1:], takers[:-1]] -= amount
        left[givers[0]] -= amount
        lacking[takers[-1]] -= amount
    return None


def _path(flow: Floats, limit: Floats, spare: Flags, poor: Flags, least: float) -> tuple[Ints, Ints] | Flags:
    """A shortest way from a machine with capacity to spare to a poor block; else the blocks that have none."""
    reached, frontier = poor.copy(), np.flatnonzero(poor)
    asked = np.zeros(len(limit), np.bool_)
    taker_of = np.zeros(len(limit), np.int64)
    giver_of = np.full(limit.shape[1], -1)
    while len(frontier):
        able = limit[:, frontier] - flow[:, frontier] > least
        machines = np.flatnonzero(able.any(axis=1) & ~asked)
        asked[machines] = True
        taker_of[machines] = frontier[able[machines].argmax(axis=1)]
        if spare[machines].any():
            givers, takers = [int(machines[spare[machines].argmax()])], []
            while True:
                takers.append(int(taker_of[givers[-1]]))
                if giver_of[takers[-1]] < 0:
                    return np.array(givers), np.array(takers)
                givers.append(int(giver_of[takers[-1]]))
        served = flow[machines] > least
        new = served.any(axis=0) & ~reached
        frontier = np.flatnonzero(new)
        reached |= new
        giver_of[frontier] = machines[served[:, frontier].argmax(axis=0)] if len(machines) else -1
    return reached
