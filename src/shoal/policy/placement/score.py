"""How good a placement is, graded, so that every step towards a better one shows.

The least throughput of a block does not show them: many blocks tie for the least, and no single machine helps them all.
So the score asks, at several shares of what the machines could carry at best, how much of it each block gets. Blocks
whose holders may all vanish at once take something off it, and blocks without a holder take off more than everything
else can add.

B changes that are compared, N blocks, K levels, W ends of spans that are still open, Z zones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.policy.machines.bound import bound_of
from shoal.policy.machines.fleet import Flags, Fleet, Floats, Ints, summed

NUM_LEVELS = 12
SHARES = np.arange(1, NUM_LEVELS + 1) / NUM_LEVELS
"""The levels, as shares of the bound. All weigh alike: only then does almost every placement that is not the best one
have a single move that raises the score. With low levels that weigh more, moves stall at 0.5 to 0.7 of the bound."""

LEAST_CHANCE = 1e-300
"""The least chance that all holders of a block in a zone vanish: it has a logarithm, however many they are."""


@dataclass(frozen=True)
class Scoring:
    """What the score is made of.

    `exact` is the weight of what blocks get when machines share their time freely; the rest is for what they get when
    each machine divides its time evenly. `risk` is what it costs, in shares of the bound, if all blocks were to lose
    their holders; `hole` is what each block costs that has no holder now: more than all else can add. `zone_loss` is
    the chance that all machines of one zone vanish together.
    """

    exact: float = 0.8
    risk: float = 1.0
    hole: float = 3.0
    zone_loss: float = 0.02


@dataclass(frozen=True)
class Changes:
    """Changes to compare: in each, one machine of an entry leaves its place, for [start, end) or for none (0:0)."""

    rows: Ints  # [B]
    starts: Ints
    ends: Ints

    @classmethod
    def none(cls) -> Changes:
        """One change that changes nothing."""
        nothing = np.zeros(1, np.int64)
        return cls(nothing - 1, nothing, nothing)

    @classmethod
    def leave(cls, rows: Ints) -> Changes:
        """Each of these entries loses one machine."""
        return cls(rows, np.zeros_like(rows), np.zeros_like(rows))


@dataclass(frozen=True)
class ScoredPlacement:
    """A placement with all sums that the score of a change is computed from."""

    fleet: Fleet
    scoring: Scoring
    bound: float
    opened: Floats  # [N, W] capacity of the spans that start at a block and end within 1, 2, .. W blocks
    even: Floats  # [N] tokens per second of each block, if machines divide their time evenly
    alone: Floats  # [N] the same if its machines compute no other block: what their networks carry
    holders: Floats  # [N]
    log_losses: Floats  # [Z, N] logarithm of the chance that all holders in a zone vanish, each for itself

    @classmethod
    def of(cls, fleet: Fleet, scoring: Scoring, bound: float | None = None) -> ScoredPlacement:
        """The bound does not depend on the placement: pass it on if it is known."""
        if bound is None:
            counts = summed(fleet.kind, fleet.counts, len(fleet.kinds.longest))
            # machines that cannot hold all blocks are still worth placing well
            bound = (
                bound_of(fleet.kinds, counts, fleet.num_blocks) or float(counts @ fleet.kinds.best) / fleet.num_blocks
            )
        num_blocks, width = fleet.num_blocks, fleet.kinds.capacity.shape[1] - 1
        amounts = fleet.capacity * fleet.weights * fleet.counts
        cells = summed(fleet.starts * (num_blocks + 1) + fleet.ends, amounts, (num_blocks + 1) ** 2)
        by_end = np.cumsum(cells.reshape(num_blocks + 1, num_blocks + 1), axis=1)
        ends = np.minimum(np.arange(num_blocks)[:, None] + 1 + np.arange(width), num_blocks)
        lengths = np.maximum(fleet.lengths, 1)
        logs = np.zeros((fleet.num_zones, num_blocks))
        for zone in range(fleet.num_zones):
            logs[zone] = fleet.per_block(np.where(fleet.zones == zone, fleet.counts * np.log(fleet.losses), 0.0))
        return cls(
            fleet,
            scoring,
            bound,
            opened=by_end[np.arange(num_blocks)[:, None], ends],
            even=np.maximum(fleet.per_block(amounts / lengths), 0.0),
            alone=np.maximum(fleet.per_block(fleet.alone * fleet.weights * fleet.counts), 0.0),
            holders=np.rint(fleet.per_block(fleet.counts)),
            log_losses=np.minimum(logs, 0.0),
        )

    @property
    def holes(self) -> Flags:
        """The blocks that no machine holds or loads."""
        return self.holders < 1

    @property
    def score(self) -> float:
        """The score of the placement itself, in tokens per second: the bound is the highest that there can be."""
        return float(self.scores(Changes.none())[0])

    def scores(self, changes: Changes, deficits: Floats | None = None) -> Floats:
        """The score after each change. Pass the `deficits` of these changes on if they are known. [B]"""
        scoring = self.scoring
        if self.bound == 0:
            return np.zeros(len(changes.rows))
        lacking = self.most - self.exact_sums(changes).sum(axis=1) if deficits is None else deficits.sum(axis=(1, 2))
        before, after = self.held_before(changes), self.held_after(changes)
        even = self.utility(self.even_after(changes, before, after)).sum(axis=1)
        throughput = (scoring.exact * (self.most - lacking) + (1 - scoring.exact) * even) / self.most
        holes = self.holders - before + after < 1
        at_risk = self.risks(changes, before, after)
        result: Floats = throughput - scoring.risk * at_risk.mean(axis=1) - scoring.hole * holes.sum(axis=1)
        return self.bound * result

    @property
    def levels(self) -> Floats:
        """The throughputs up to which it counts what each block gets, in tokens per second. [K]"""
        levels: Floats = SHARES * self.bound
        return levels

    @property
    def most(self) -> float:
        """The sum over levels of what all blocks get if they reach the bound."""
        return float(self.fleet.num_blocks * self.levels.sum())

    def utility(self, throughput: Floats) -> Floats:
        """What tokens per second of one block count for: the sum over levels of what they reach of it."""
        knots = np.concatenate(([0.0], self.levels))
        values = np.minimum(knots[:, None], self.levels).sum(axis=1)
        useful: Floats = np.interp(throughput, knots, values)
        return useful

    def held_before(self, changes: Changes) -> Flags:
        """The blocks that the machine of each change holds now. [B, N]"""
        rows = changes.rows
        present = rows >= 0
        starts, ends = self.fleet.starts[rows], self.fleet.ends[rows]
        return _inside(starts, ends, self.fleet.num_blocks) & present[:, None]

    def held_after(self, changes: Changes) -> Flags:
        """The blocks that the machine of each change holds after it. [B, N]"""
        return _inside(changes.starts, changes.ends, self.fleet.num_blocks)

    def capacity_before(self, changes: Changes) -> Floats:
        """What the machine of each change can do now, as far as it counts. [B]"""
        fleet, rows = self.fleet, changes.rows
        capacity: Floats = np.where(rows >= 0, fleet.capacity[rows] * fleet.weights[rows], 0.0)
        return capacity

    def capacity_after(self, changes: Changes) -> Floats:
        """What the machine of each change can do after it. [B]"""
        capacity: Floats = self.fleet.kinds.capacity[self.fleet.kind[changes.rows], changes.ends - changes.starts]
        return capacity

    def even_after(self, changes: Changes, before: Flags, after: Flags) -> Floats:
        """Tokens per second of each block after each change, if machines divide their time evenly. [B, N]"""
        lost = self.capacity_before(changes) / np.maximum(self.fleet.lengths[changes.rows], 1)
        won = self.capacity_after(changes) / np.maximum(changes.ends - changes.starts, 1)
        even: Floats = np.maximum(self.even - before * lost[:, None] + after * won[:, None], 0.0)
        return even

    def alone_after(self, changes: Changes) -> Floats:
        """Tokens per second of each block after each change, if its machines compute no other block. [B, N]"""
        network = self.fleet.kinds.network[self.fleet.kind[changes.rows]]
        lost = np.minimum(self.capacity_before(changes), network * self.fleet.weights[changes.rows])
        won = np.minimum(self.capacity_after(changes), network)
        before, after = self.held_before(changes), self.held_after(changes)
        alone: Floats = np.maximum(self.alone - before * lost[:, None] + after * won[:, None], 0.0)
        return alone

    def risks(self, changes: Changes, before: Flags, after: Flags) -> Floats:
        """The chance that a block loses all its holders before others have loaded. [B, N]"""
        zones, loss = self.fleet.zones[changes.rows], np.log(self.fleet.losses[changes.rows])
        factors = self._zone_factors(self.log_losses, np.arange(self.fleet.num_zones))
        others = np.log(factors).sum(axis=0) - np.log(factors)[zones]
        here = self.log_losses[zones] + loss[:, None] * (after.astype(np.float64) - before)
        lost: Floats = np.exp(others) * self._zone_factors(np.minimum(here, 0.0), zones)
        return lost

    def _zone_factors(self, logs: Floats, zones: Ints) -> Floats:
        """The chance that all holders in a zone vanish: each for itself, or all together where the zone is known."""
        together = np.where(zones == 0, 0.0, self.scoring.zone_loss)[:, None]
        factor = together + (1 - together) * np.exp(logs)
        return np.where(logs < 0, np.maximum(factor, LEAST_CHANCE), 1.0)

    def exact_sums(self, changes: Changes, levels: Floats | None = None) -> Floats:
        """At each level, by default those of the score, the sum over blocks of what they get of it. [B, K]"""
        return self._sweep(changes, self.levels if levels is None else levels, None)

    def deficits(self, changes: Changes) -> Floats:
        """What each block lacks at each level after each change, where earlier blocks are served first. [B, K, N]"""
        served = np.empty((len(changes.rows), len(SHARES), self.fleet.num_blocks))
        self._sweep(changes, self.levels, served)
        return np.maximum(self.levels[:, None] - served, 0.0)

    def _sweep(self, changes: Changes, levels: Floats, keep: Floats | None) -> Floats:
        leaving = _by_start(self.fleet.starts[changes.rows], self.fleet.ends[changes.rows], changes.rows >= 0)
        coming = _by_start(changes.starts, changes.ends, changes.ends > changes.starts)
        lost, won = self.capacity_before(changes), self.capacity_after(changes)
        return _sweep(self.opened, self.alone_after(changes), levels, leaving, coming, lost, won, keep)


def _sweep(
    opened: Floats,
    alone: Floats,
    levels: Floats,
    leaving: dict[int, list[tuple[int, int]]],
    coming: dict[int, list[tuple[int, int]]],
    lost: Floats,
    won: Floats,
    keep: Floats | None,
) -> Floats:
    """From the first block to the last, each is served by the machines that hold it whose spans end first. [B, K]

    What machines can still do that hold the block and whose spans end after `end` blocks at the latest is in row
    `end % W` of `left`: so serving a block takes the same amount off all rows, down to nothing, and nothing is moved
    when machines are passed. No block gets more than its machines do if they compute it `alone`. What each block gets
    goes to `keep`.
    """
    num_blocks, width = opened.shape
    left = np.zeros((width, len(lost), len(levels)))
    total = np.zeros(left.shape[1:])
    limits = alone if alone.min() < levels.max() else np.full((1, num_blocks), np.inf)
    for block in range(num_blocks):
        rows = (block + np.arange(width)) % width
        for change, column in leaving.get(block, ()):
            left[rows[column:], change] -= lost[change]
        for change, column in coming.get(block, ()):
            left[rows[column:], change] += won[change]
        asked = np.minimum(levels, limits[:, block, None])
        added = np.empty((width, len(asked), len(levels)))
        added[rows] = opened[block][:, None, None] - asked
        left += added
        served = asked + np.minimum(left[rows[-1]], 0.0)
        total += served
        if keep is not None:
            keep[:, :, block] = served
        np.maximum(left, 0.0, out=left)
        ends_here = left[rows[0]].copy()
        if ends_here.any():
            left -= ends_here
        left[rows[0]] = left[rows[-1]]
    return total


def _by_start(starts: Ints, ends: Ints, present: Flags) -> dict[int, list[tuple[int, int]]]:
    """The changes by the block where their span starts, each with the column of its end."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row in np.flatnonzero(present & (ends > starts)):
        start = int(starts[row])
        found.setdefault(start, []).append((int(row), int(ends[row]) - start - 1))
    return found


def _inside(starts: Ints, ends: Ints, num_blocks: int) -> Flags:
    blocks = np.arange(num_blocks)
    return (starts[:, None] <= blocks) & (blocks < ends[:, None])
