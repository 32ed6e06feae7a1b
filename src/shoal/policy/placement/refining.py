"""What a quiet swarm looks at besides the graded score: how much all blocks can get at once, in small steps.

The graded score hardly tells good placements apart: one that carries .85 of the bound scores one percent less than the
best. Where gains last, moves also climb. The *height* of a placement is what it carries, counted in rungs of one
percent of the bound, and on the next rung, what blocks get of it on average. It is a number that depends on nothing but
the placement, and so is its sum with the score: moves that raise that sum come to an end.

Machines share their time as well as they can: each block is first served from what its machines cannot use later, since
their networks limit what they do for each block, and then by the machines whose spans end first. That comes within a
percent of the exact optimum (`machines/sharing.py`). B changes, M machines, N blocks, K rungs, L lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.policy.machines.fleet import Fleet, Floats, Ints
from shoal.policy.placement.needed import Needed
from shoal.policy.placement.score import Changes, ScoredPlacement
from shoal.policy.placement.search import best_places, best_values, mirrored, running_sum, windows

RUNG = 0.01
"""A step of the height, as a part of the bound."""
WEIGHT = 3.0
"""How much the height weighs beside the score."""
LOOK_DOWN, LOOK_UP = 1, 3
"""The rungs below and above the present one that changes are compared on. One that falls deeper is no improvement."""
MAX_REFINED = 256
"""The most machines of a swarm whose height is computed. More machines hold so many copies that moves gain nothing."""
NO_LIMIT = 1e15
"""Stands for the speed of a network that does not limit a machine."""
FULL = 1 - 1e-9


def is_refinable(fleet: Fleet) -> bool:
    """Whether gains last in this swarm, and it is small enough to compute its height."""
    return fleet.quiet and len(fleet.machines) <= MAX_REFINED and bool((fleet.counts == 1).all())


@dataclass(frozen=True)
class Refined:
    """A placement in a quiet swarm, to be improved by single moves. `scores` and `score` include the height."""

    placement: ScoredPlacement
    rungs: Floats  # [K] the rungs around the present height, in tokens per second
    upper: Floats  # [LOOK_UP] those of them that are not reached
    height: float

    @classmethod
    def of(cls, placement: ScoredPlacement) -> Refined:
        """The placement with its height."""
        ladder: Floats = np.arange(1, round(1 / RUNG) + 1, dtype=np.float64) * RUNG * placement.bound
        served = _served(placement.fleet, Changes.none(), ladder).mean(axis=2)[0]
        missed = np.flatnonzero(served < ladder * FULL)
        rung = int(missed[0]) if len(missed) else len(ladder) - 1
        upper = ladder[rung : rung + LOOK_UP]
        return cls(placement, ladder[max(0, rung - LOOK_DOWN) : rung + LOOK_UP], upper, float(served[rung]))

    @property
    def score(self) -> float:
        """The score of the placement itself, with its height."""
        return self.placement.score + WEIGHT * self.height

    def scores(self, changes: Changes) -> Floats:
        """The score after each change, with the height then. [B]"""
        return self.placement.scores(changes) + WEIGHT * self.heights(changes)

    def heights(self, changes: Changes) -> Floats:
        """The height after each change, as far as the rungs go that are looked at. [B]"""
        served = _served(self.placement.fleet, changes, self.rungs).mean(axis=2)
        missed = served < self.rungs * FULL
        first = np.where(missed.any(axis=1), missed.argmax(axis=1), len(self.rungs) - 1)
        heights: Floats = served[np.arange(len(first)), first]
        return heights

    def best_places(self, rows: Ints, *, most: int, each: int, needed: Needed) -> tuple[Changes, Floats]:
        """The most promising changes for the score, and those for the height; the scores without the machines. [M]

        `most` and `each` hold for both kinds. Equal changes are listed once. The height that is lost while a machine
        loads is left out: that is a minute of a day.
        """
        graded, without = best_places(self.placement, rows, most=most, each=each, needed=needed)
        climbing = self._climbing(rows, most=most, each=each, needed=needed)
        listed = [np.stack((changes.rows, changes.starts, changes.ends), axis=1) for changes in (graded, climbing)]
        changes = Changes(*np.unique(np.concatenate(listed), axis=0).T)
        return changes, without + WEIGHT * self.height

    def _climbing(self, rows: Ints, *, most: int, each: int, needed: Needed) -> Changes:
        fleet = self.placement.fleet
        kinds, most_blocks = fleet.kind[rows], fleet.kinds.capacity.shape[1] - 1
        network = fleet.kinds.network[kinds]
        leave = Changes.leave(rows)
        forward = _served(fleet, leave, self.upper)
        backward = _served(mirrored(fleet), leave, self.upper)[:, :, ::-1]
        ways = []
        for served in (forward, backward):
            lacking = np.minimum(np.maximum(self.upper[:, None] - served, 0.0), network[:, None, None])
            ways.append((running_sum(lacking), served.sum(axis=(1, 2))))
        estimates = np.full((len(rows), most_blocks, fleet.num_blocks), -np.inf)
        for length in range(1, most_blocks + 1):
            able = fleet.kinds.longest[kinds] >= length
            capacity = fleet.kinds.capacity[kinds, length][:, None, None]
            reached = np.maximum(
                *(np.minimum(windows(run, length), capacity).sum(axis=1) + had[:, None] for run, had in ways)
            )
            estimates[able, length - 1, : reached.shape[1]] = reached[able]
        estimates[~needed.places(rows, most_blocks)] = -np.inf
        present = np.flatnonzero(fleet.lengths[rows] > 0)
        estimates[present, fleet.lengths[rows[present]] - 1, fleet.starts[rows[present]]] = -np.inf
        entry, place_length, start = best_values(estimates, self.placement.bound, most=most, each=each)
        return Changes(rows[entry], start, start + place_length + 1)


def _served(fleet: Fleet, changes: Changes, levels: Floats) -> Floats:
    """Tokens per second that each block gets after each change if so much is asked of all. [B, K, N]"""
    starts, ends, capacity, network = _after(fleet, changes)
    left = np.repeat(capacity[:, None, :], len(levels), axis=1)
    result = np.zeros((len(starts), len(levels), fleet.num_blocks))
    for block in range(fleet.num_blocks):
        inside = (starts <= block) & (block < ends)
        columns = np.flatnonzero(inside.any(axis=0))
        if len(columns) == 0:
            continue
        here, limit = left[:, :, columns], np.where(inside, network, 0.0)[:, columns]
        offered = np.minimum(here, limit[:, None, :])
        usable_later = limit * np.maximum(ends[:, columns] - block - 1, 0)
        spare = np.clip(here - usable_later[:, None, :], 0.0, offered)
        first, reached = _share_out(spare, np.broadcast_to(levels, left.shape[:2]))
        second, more = _share_out(offered - first, levels - reached)
        left[:, :, columns] = here - first - second
        result[:, :, block] = reached + more
    return result


def _share_out(offered: Floats, asked: Floats) -> tuple[Floats, Floats]:
    """What each machine gives of what it offers, the first ones first, and their sum: at most what is asked."""
    reached = np.minimum(np.cumsum(offered, axis=2), asked[:, :, None])
    given = reached.copy()
    given[:, :, 1:] -= reached[:, :, :-1]
    return given, reached[:, :, -1]


def _after(fleet: Fleet, changes: Changes) -> tuple[Ints, Ints, Floats, Floats]:
    """Start, end, capacity and network of all machines after each change, by the ends of their spans. [B, M]"""
    shape = (len(changes.rows), len(fleet.machines))
    starts, ends = np.broadcast_to(fleet.starts, shape).copy(), np.broadcast_to(fleet.ends, shape).copy()
    capacity = np.broadcast_to(fleet.capacity * fleet.weights, shape).copy()
    network = np.broadcast_to(np.minimum(fleet.kinds.network[fleet.kind], NO_LIMIT), shape)
    changed = np.flatnonzero(changes.rows >= 0)
    rows, there, end = changes.rows[changed], changes.starts[changed], changes.ends[changed]
    starts[changed, rows], ends[changed, rows] = there, end
    capacity[changed, rows] = fleet.kinds.capacity[fleet.kind[rows], end - there]
    order = np.argsort(ends, axis=1, kind="stable")
    return (
        np.take_along_axis(starts, order, 1),
        np.take_along_axis(ends, order, 1),
        np.take_along_axis(capacity, order, 1),
        np.take_along_axis(network, order, 1),
    )
