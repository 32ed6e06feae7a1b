"""How good a placement is, graded, so that every step towards a better one shows.

The least throughput of a block does not show them: many blocks tie for the least, and no single machine helps them all.
So the score asks, at several shares of what the machines could carry at best, how much of it each block gets, and the
low shares weigh most. Blocks whose holders may all vanish at once take something off it, and blocks without a holder
take off more than everything else can add.

B changes that are compared, N blocks, K levels, W ends of spans that are still open, Z zones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.policy.placement.bound import bound_of
from shoal.policy.placement.fleet import Flags, Fleet, Floats, Ints, summed

SHARES = np.array([0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0])
"""The levels of what a block gets if machines divide their time evenly, as shares of the bound."""
WEIGHTS = 16.0 * 2.0 ** np.linspace(0.0, -5.0, len(SHARES))
"""What a token per second of a block weighs below each of them."""
STEPS = np.array([0.5, 0.8, 1.0, 1.03, 1.08, 1.16, 1.32, 1.7])
"""The levels of what blocks get if machines share their time freely, as multiples of what all blocks get now."""
STEP_WEIGHTS = np.array([2.0, 2.0, 2.0, 4.0, 2.0, 1.0, 0.5, 0.25])
ANCHOR_STEP = 1.03
"""What all blocks get now is rounded down to a power of this: small changes do not shift the levels."""


@dataclass(frozen=True)
class Scoring:
    """What the score is made of.

    `exact` is the weight of what blocks get when machines share their time freely; the rest is for what they get when
    each machine divides its time evenly. `risk` is what it costs, in shares of the bound, if all blocks were to lose
    their holders; `hole` is what each block costs that has no holder now: more than all else can add. `zone_loss` is
    the chance that all machines of one zone vanish together.
    """

    exact: float = 0.6
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
class Picture:
    """A placement with all sums that the score of a change is computed from."""

    fleet: Fleet
    scoring: Scoring
    bound: float
    anchor: float  # tokens per second that all blocks reach; 0 if some have no holder
    opened: Floats  # [N, W] capacity of the spans that start at a block and end within 1, 2, .. W blocks
    even: Floats  # [N] tokens per second of each block, if machines divide their time evenly
    holders: Floats  # [N]
    log_losses: Floats  # [Z, N] logarithm of the chance that all holders in a zone vanish, each for itself

    @classmethod
    def of(cls, fleet: Fleet, scoring: Scoring, bound: float | None = None, anchor: float | None = None) -> Picture:
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
        opened = by_end[np.arange(num_blocks)[:, None], ends]
        return cls(
            fleet,
            scoring,
            bound,
            _anchor(opened, bound) if anchor is None else anchor,
            opened=opened,
            even=np.maximum(fleet.per_block(amounts / lengths), 0.0),
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

    def scores(self, changes: Changes) -> Floats:
        """The score after each change. [B]"""
        scoring = self.scoring
        if self.bound == 0:
            return np.zeros(len(changes.rows))
        served = self.exact_sums(changes) @ self.weights
        before, after = self.held_before(changes), self.held_after(changes)
        even = self.utility(self.even_after(changes, before, after)).sum(axis=1)
        throughput = scoring.exact * served + (1 - scoring.exact) * even / self.most
        holes = self.holders - before + after < 1
        at_risk = self.risks(changes, before, after)
        result: Floats = throughput - scoring.risk * at_risk.mean(axis=1) - scoring.hole * holes.sum(axis=1)
        return self.bound * result

    @property
    def levels(self) -> Floats:
        """The levels at which machines share their time freely: around what all blocks get, else from low to high."""
        if self.anchor == 0:
            return SHARES * self.bound
        levels: Floats = np.minimum(STEPS * self.anchor, self.bound)
        return levels

    @property
    def weights(self) -> Floats:
        """What a token per second of one block adds to the score, in shares of the bound, at each level."""
        weights = WEIGHTS if self.anchor == 0 else STEP_WEIGHTS
        shares: Floats = weights / (weights.sum() * self.fleet.num_blocks * self.bound)
        return shares

    @property
    def most(self) -> float:
        """The sum of `utility` over the blocks of a placement whose blocks all reached the bound."""
        return float(self.fleet.num_blocks * (WEIGHTS @ (SHARES * self.bound)))

    def utility(self, throughput: Floats) -> Floats:
        """What tokens per second of one block count for."""
        knots = np.concatenate(([0.0], SHARES * self.bound))
        values = np.minimum(knots[:, None], SHARES * self.bound) @ WEIGHTS
        return np.interp(throughput, knots, values)

    def held_before(self, changes: Changes) -> Flags:
        """The blocks that the machine of each change holds now. [B, N]"""
        rows = changes.rows
        present = rows >= 0
        starts, ends = self.fleet.starts[rows], self.fleet.ends[rows]
        return _inside(starts, ends, self.fleet.num_blocks) & present[:, None]

    def held_after(self, changes: Changes) -> Flags:
        return _inside(changes.starts, changes.ends, self.fleet.num_blocks)

    def capacity_before(self, changes: Changes) -> Floats:
        fleet, rows = self.fleet, changes.rows
        capacity: Floats = np.where(rows >= 0, fleet.capacity[rows] * fleet.weights[rows], 0.0)
        return capacity

    def capacity_after(self, changes: Changes) -> Floats:
        capacity: Floats = self.fleet.kinds.capacity[self.fleet.kind[changes.rows], changes.ends - changes.starts]
        return capacity

    def even_after(self, changes: Changes, before: Flags, after: Flags) -> Floats:
        """Tokens per second of each block after each change, if machines divide their time evenly. [B, N]"""
        lost = self.capacity_before(changes) / np.maximum(self.fleet.lengths[changes.rows], 1)
        won = self.capacity_after(changes) / np.maximum(changes.ends - changes.starts, 1)
        even: Floats = np.maximum(self.even - before * lost[:, None] + after * won[:, None], 0.0)
        return even

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
        return np.where(logs < 0, factor, 1.0)

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
        return _sweep(self.opened, levels, leaving, coming, lost, won, keep)

    def keeps(self, changes: Changes) -> Flags:
        """Whether all blocks still reach what they reach now, as rounded for the levels. [B]"""
        if self.anchor == 0:
            return np.ones(len(changes.rows), np.bool_)
        level = np.array([self.anchor])
        kept: Flags = self.exact_sums(changes, level)[:, 0] >= self.fleet.num_blocks * self.anchor * (1 - 1e-9)
        return kept

    def lacked(self) -> Floats:
        """What all blocks together lack, at each level. [K]"""
        lacked: Floats = self.fleet.num_blocks * self.levels - self.exact_sums(Changes.none())[0]
        return lacked

    def needy(self) -> Flags:
        """Where a little more capacity in one block would be used, at each level. [K, N]"""
        num_blocks = self.fleet.num_blocks
        little = 1e-6 * self.bound
        coming = {block: [(block, 0)] for block in range(num_blocks)}
        nothing, won = np.zeros(num_blocks), np.full(num_blocks, little)
        more = _sweep(self.opened, self.levels, {}, coming, nothing, won, None)
        base = _sweep(self.opened, self.levels, {}, {}, np.zeros(1), np.zeros(1), None)
        needy: Flags = (more - base > little / 2).T
        return needy


def _anchor(opened: Floats, bound: float) -> float:
    """The highest level that all blocks reach, rounded down to a power of `ANCHOR_STEP` times the bound."""
    low, high = 0.0, bound
    for _ in range(3):
        levels = np.linspace(low, high, 26)[1:]
        sums = _sweep(opened, levels, {}, {}, np.zeros(1), np.zeros(1), None)[0]
        reached = sums >= len(opened) * levels * (1 - 1e-9)
        first = len(levels) if reached.all() else int(np.argmin(reached))
        low, high = float(levels[first - 1]) if first else low, float(levels[min(first, len(levels) - 1)])
    if low < bound / 1000:
        return 0.0
    return float(bound * ANCHOR_STEP ** np.floor(np.log(low / bound) / np.log(ANCHOR_STEP) + 1e-9))


def _sweep(
    opened: Floats,
    levels: Floats,
    leaving: dict[int, list[tuple[int, int]]],
    coming: dict[int, list[tuple[int, int]]],
    lost: Floats,
    won: Floats,
    keep: Floats | None,
) -> Floats:
    """From the first block to the last, each is served by the machines that hold it whose spans end first. [B, K]

    `left[.., w]` is what the machines that hold the block and whose spans end within w + 1 blocks can still do: so
    serving a block takes the same amount off all of them, down to nothing. What each block gets goes to `keep`.
    """
    num_blocks, width = opened.shape
    level = levels[:, None]
    left = np.zeros((len(lost), len(levels), width))
    shifted = np.zeros_like(left)
    total = np.zeros(left.shape[:2])
    for block in range(num_blocks):
        left += opened[block]
        for row, column in leaving.get(block, ()):
            left[row, :, column:] -= lost[row]
        for row, column in coming.get(block, ()):
            left[row, :, column:] += won[row]
        served = np.minimum(left[:, :, -1], levels)
        total += served
        if keep is not None:
            keep[:, :, block] = served
        left -= level
        np.maximum(left, 0.0, out=left)
        if width > 1:
            np.subtract(left[:, :, 1:], left[:, :, :1], out=shifted[:, :, :-1])
            shifted[:, :, -1] = shifted[:, :, -2]
        else:
            shifted[:] = 0.0
        left, shifted = shifted, left
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
