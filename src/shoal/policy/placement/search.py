"""Which places of which machines are worth computing the score of.

A hundred machines have hundreds of thousands of places to go to. The gain of each is estimated from sums over blocks,
all at once; only the best are then scored. M machines, L lengths, N blocks, K levels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shoal.policy.machines.fleet import Fleet, Floats, Ints
from shoal.policy.placement.needed import Needed
from shoal.policy.placement.score import Changes, ScoredPlacement


def best_places(
    placement: ScoredPlacement,
    rows: Ints,
    *,
    most: int,
    each: int,
    min_blocks: int = 1,
    needed: Needed | None = None,
) -> tuple[Changes, Floats]:
    """The most promising changes of one machine of each entry: at most `each` of one, and at most `most` in all.

    No change gives up what is `needed` of its machine. The changes are in the order of entry, length and start. Also
    returns the scores without the machines of these entries. [M]
    """
    leave = Changes.leave(rows)
    deficits = placement.deficits(leave)
    without = placement.scores(leave, deficits)
    estimates = _estimates(placement, rows, deficits) + without[:, None, None]
    lengths = np.arange(1, estimates.shape[1] + 1)
    longest = placement.fleet.kinds.longest[placement.fleet.kind[rows]]
    too_short = lengths < np.minimum(min_blocks, longest)[:, None]
    estimates[too_short] = -np.inf
    if needed is not None:
        estimates[~needed.places(rows, estimates.shape[1])] = -np.inf
    present, old = np.flatnonzero(placement.fleet.lengths[rows] > 0), rows[placement.fleet.lengths[rows] > 0]
    estimates[present, placement.fleet.lengths[old] - 1, placement.fleet.starts[old]] = -np.inf
    entry, length, start = best_values(estimates, placement.bound, most=most, each=each)
    return Changes(rows[entry], start, start + length + 1), without


def best_values(values: Floats, bound: float, *, most: int, each: int) -> tuple[Ints, Ints, Ints]:
    """Where the highest values are, by entry, length and start: at most `each` of an entry, and `most` in all."""
    flat = _without_ties(values.reshape(len(values), -1), bound)
    if flat.shape[1] > each:
        columns = np.argpartition(-flat, each - 1, axis=1)[:, :each]
    else:
        columns = np.broadcast_to(np.arange(flat.shape[1]), flat.shape)
    found = np.take_along_axis(flat, columns, axis=1).ravel()
    cells = (columns + np.arange(len(values))[:, None] * flat.shape[1]).ravel()
    if len(found) > most:
        chosen = np.argpartition(-found, most - 1)[:most]
        found, cells = found[chosen], cells[chosen]
    entry, length, start = np.unravel_index(np.sort(cells[found > -np.inf]), values.shape)
    return entry, length, start


def _without_ties(values: Floats, bound: float) -> Floats:
    """Values that are equal but for rounding errors, told apart by their index: the first is the best.

    Sums in another order must not lead to another choice.
    """
    step = max(bound, 1e-300) * 1e-8
    return np.round(values / step) - np.arange(values.size).reshape(values.shape) * 1e-6


def _estimates(placement: ScoredPlacement, rows: Ints, deficits: Floats) -> Floats:
    """About how much the score gains over that without the machine, by where the machine goes. [M, L, N]

    `deficits` are those without the machines.
    """
    fleet, scoring = placement.fleet, placement.scoring
    leave = Changes.leave(rows)
    before, everywhere = placement.held_before(leave), np.ones((len(rows), fleet.num_blocks), np.bool_)
    alone = placement.even_after(leave, before, placement.held_after(leave))
    useful = placement.utility(alone)
    relieved = placement.risks(leave, before, ~everywhere) - placement.risks(leave, before, everywhere)
    holes = placement.holders - before < 1
    relief = running_sum(scoring.risk * relieved / fleet.num_blocks + scoring.hole * holes)
    lacking = running_sum(deficits)
    backward = ScoredPlacement.of(mirrored(fleet), scoring, placement.bound).deficits(leave)[:, :, ::-1]
    lacking_mirrored = running_sum(backward)
    kinds = fleet.kind[rows]
    most = fleet.kinds.capacity.shape[1] - 1
    result = np.full((len(rows), most, fleet.num_blocks), -np.inf)
    for length in range(1, most + 1):
        able = fleet.kinds.longest[kinds] >= length
        capacity = fleet.kinds.capacity[kinds, length]
        served = np.maximum(_served(lacking, capacity, length), _served(lacking_mirrored, capacity, length))
        even = windows(running_sum(placement.utility(alone + (capacity / length)[:, None]) - useful), length)
        throughput = (scoring.exact * served + (1 - scoring.exact) * even) / max(placement.most, 1e-300)
        gain = placement.bound * (throughput + windows(relief, length))
        result[able, length - 1, : gain.shape[1]] = gain[able]
    return result


def _served(lacking: Floats, capacity: Floats, length: int) -> Floats:
    """What a machine can do about what the blocks of each span lack, summed over levels. [M, N - L + 1]"""
    useful: Floats = np.minimum(windows(lacking, length), capacity[:, None, None]).sum(axis=1)
    return useful


def mirrored(fleet: Fleet) -> Fleet:
    """The same machines where the last block is the first."""
    placed = fleet.lengths > 0
    starts = np.where(placed, fleet.num_blocks - fleet.ends, 0)
    return replace(fleet, starts=starts, ends=np.where(placed, fleet.num_blocks - fleet.starts, 0))


def running_sum(values: Floats) -> Floats:
    """Along the last axis, from 0."""
    result = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=result[..., 1:])
    return result


def windows(running: Floats, length: int) -> Floats:
    """The sums of all windows of this length, along the last axis."""
    return running[..., length:] - running[..., :-length]


def most_promising(placement: ScoredPlacement, rows: Ints, most: int) -> Ints:
    """Of many entries, those that seem to lose least where they are for what they could gain elsewhere, in order."""
    if len(rows) <= most:
        return rows
    fleet, scoring = placement.fleet, placement.scoring
    rate = (placement.utility(placement.even * 1.0001 + 1e-9) - placement.utility(placement.even)) / (
        placement.even * 0.0001 + 1e-9
    )
    leave = Changes.leave(np.array([rows[0]]))
    no_blocks = np.zeros((1, fleet.num_blocks), np.bool_)
    risks = placement.risks(leave, no_blocks, no_blocks)[0]
    price = running_sum(rate / max(placement.most, 1e-300))
    danger = running_sum(scoring.risk * risks / fleet.num_blocks + scoring.hole * placement.holes)
    starts, ends = fleet.starts[rows], fleet.ends[rows]
    speed = fleet.capacity[rows] / np.maximum(fleet.lengths[rows], 1)
    loss = speed * (price[ends] - price[starts])
    loss += (danger[ends] - danger[starts]) * np.maximum(1 / fleet.losses[rows] - 1, 0.0)
    capacity, longest = fleet.kinds.capacity[fleet.kind[rows]], fleet.kinds.longest[fleet.kind[rows]]
    gain = np.full(len(rows), -np.inf)
    for length in range(1, capacity.shape[1]):
        won = capacity[:, length] / length * windows(price, length).max() + windows(danger, length).max()
        gain = np.where(longest >= length, np.maximum(gain, won), gain)
    return np.sort(rows[np.argsort(loss - gain, kind="stable")[:most]])
