"""The shared plan: which machines move, and where. All servers compute it alike, and each does its own step of it.

A plan is a list of moves, each the best single one after those before it. A move must raise the score of the placement
(`score.py`), which does not depend on time once all machines have loaded: so plans come to an end.

No move opens a hole. A machine leaves blocks only if each of them has another server that is online and keeps them by
the same plan; blocks that it keeps itself while it loads others need none (`needed.py`). That other server must be one
whose claim is plausible: a machine that claims to hold everything, where the others hold parts, moves no machine off
the blocks that it claims. To fill a hole, a machine also leaves blocks to a doubted machine, if that one does not claim
all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.policy.machines.fleet import HORIZON, Flags, Fleet, Floats, Ints
from shoal.policy.machines.lifetime import Lifetimes
from shoal.policy.machines.machine import Machine
from shoal.policy.placement.needed import Needed
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.policy.placement.search import best_places, most_promising
from shoal.policy.view import format_blocks
from shoal.spans import Span

MAX_MOVES = 8
"""The most moves of a plan. What is left to do is in the next one."""
LEAST_GAIN = 0.04
"""A move gains at least this part of what the machine can add to the swarm: the next change may undo smaller gains."""
QUIET_LEAST_GAIN = 0.002
"""The same in a quiet swarm (`Fleet.quiet`), where gains last."""
MAX_MOVERS = 128
"""The entries whose moves are compared, where there are more. With 48, swarms of 100 machines stopped far earlier."""
PLACES_SCORED = 96
"""The places that are scored for each move."""
PLACES_EACH = 12
"""The places of one entry among them, at most."""
DEFAULT_SCORING = Scoring()


@dataclass(frozen=True)
class Move:
    """A machine leaves the span `before` for `after`.

    `gain` is what the score gains, in tokens per second. `fills` are the blocks that had no holder. `rank` is the place
    of the move in its plan, from 0. `reason` is for people.
    """

    peer: str
    before: Span
    after: Span
    gain: float
    fills: tuple[int, ...]
    rank: int
    reason: str


def plan_moves(
    machines: Sequence[Machine],
    num_blocks: int,
    *,
    now: float,
    lifetimes: Lifetimes | None = None,
    scoring: Scoring = DEFAULT_SCORING,
    max_moves: int = MAX_MOVES,
) -> tuple[Move, ...]:
    """The best single moves, one after another, until none gains enough; at most `max_moves`.

    Equal views give equal plans, in whatever order they list the machines. `now` is the time of the view, which says
    which machines are still loading. With `lifetimes`, blocks whose holders may vanish soon count as more in danger.
    """
    if not machines:
        return ()
    fleet = Fleet.of(machines, num_blocks, now=now, lifetimes=lifetimes)
    placement = ScoredPlacement.of(fleet, scoring)
    moves: list[Move] = []
    while len(moves) < max_moves:
        found = _best_move(placement, rank=len(moves))
        if found is None:
            break
        row, move = found
        moves.append(move)
        placement = ScoredPlacement.of(placement.fleet.moved(row, move.after), scoring, placement.bound)
    return tuple(moves)


def _best_move(placement: ScoredPlacement, *, rank: int) -> tuple[int, Move] | None:
    """The best move of one machine, and the entry of that machine."""
    fleet = placement.fleet
    holes = placement.holes
    needed = Needed.of(fleet, ~fleet.doubted)
    needed_to_fill = Needed.of(fleet, ~fleet.whole) if holes.any() else needed
    rows = most_promising(
        placement, _one_of_each(fleet, np.flatnonzero(fleet.movable & (fleet.lengths > 0))), MAX_MOVERS
    )
    if len(rows) == 0 or placement.bound == 0:
        return None
    score = placement.score
    places, without = best_places(placement, rows, most=PLACES_SCORED, each=PLACES_EACH, needed=needed_to_fill)
    if len(places.rows) == 0:
        return None
    after = placement.scores(places)
    filled = np.concatenate(([0], np.cumsum(holes)))
    num_filled = filled[places.ends] - filled[places.starts]
    fills = num_filled > 0
    loading, keeps = _loading(fleet, places)
    meanwhile = np.where(keeps, score, without[np.searchsorted(rows, places.rows)])
    # the mean score of the next ten minutes, less that of staying
    value = loading * meanwhile + (1 - loading) * after - score
    gain = after - score
    pays = (value > 0) & (gain >= _least_gain(placement)[places.rows]) & needed.allows(places)
    allowed = (fills & (gain > 0) & needed_to_fill.allows(places)) | (~fills & pays)
    if not allowed.any():
        return None
    if (fills & allowed).any():  # however long they take to load: a swarm with a hole carries nothing
        allowed &= num_filled == num_filled[allowed].max()
    # rounded, so that sums in another order do not lead to another choice: of equal moves, the first is the best
    worth = np.round(value / (placement.bound * 1e-8))
    best = int(np.where(allowed, worth, -np.inf).argmax())
    return int(places.rows[best]), _move(placement, places, best, gain=float(gain[best]), rank=rank)


def _one_of_each(fleet: Fleet, rows: Ints) -> Ints:
    """Of entries whose machines are alike in all that decides, the first. The others would only use up places."""
    found: dict[tuple[object, ...], int] = {}
    for row in rows.tolist():
        one = fleet.machines[row]
        loading = (one.load_seconds, one.disk_seconds, one.on_disk)
        key = (fleet.kind[row], one.span, fleet.doubted[row], fleet.losses[row], fleet.zones[row], loading)
        found.setdefault(key, row)
    return np.array(list(found.values()), np.int64)


def _loading(fleet: Fleet, places: Changes) -> tuple[Floats, Flags]:
    """For which part of the next ten minutes each machine would load, and whether it would serve meanwhile."""
    moves = [
        (fleet.machines[row], Span(start, end))
        for row, start, end in zip(places.rows.tolist(), places.starts.tolist(), places.ends.tolist(), strict=True)
    ]
    seconds = np.array([machine.seconds_to_load(span) for machine, span in moves])
    keeps = np.array([machine.keeps(span) is not None for machine, span in moves], np.bool_)
    return np.clip(seconds / HORIZON, 0.0, 1.0), keeps


def _least_gain(placement: ScoredPlacement) -> Floats:
    """What a move of one machine of each entry must gain: a part of its share of what all can do."""
    best = placement.fleet.kinds.best[placement.fleet.kind]
    least = QUIET_LEAST_GAIN if placement.fleet.quiet else LEAST_GAIN
    return least * placement.bound * best / max(float(best @ placement.fleet.counts), 1e-300)


def _move(placement: ScoredPlacement, places: Changes, index: int, *, gain: float, rank: int) -> Move:
    fleet, row = placement.fleet, int(places.rows[index])
    before = Span(int(fleet.starts[row]), int(fleet.ends[row]))
    after = Span(int(places.starts[index]), int(places.ends[index]))
    fills = tuple(block for block in after if placement.holes[block])
    reason = _reason(placement, row, before, after, fills)
    return Move(fleet.machines[row].peer, before, after, gain, fills, rank, reason)


def _reason(placement: ScoredPlacement, row: int, before: Span, after: Span, fills: Sequence[int]) -> str:
    """Why a machine moves, in a sentence: what its new blocks lack, compared with those that it leaves."""
    if fills:
        return f"blocks {format_blocks(fills)} have no server"
    gained = [block for block in after if block not in before]
    left = [block for block in before if block not in after]
    if not gained:
        return f"with fewer blocks, {after}, it computes more for each"
    there = float(placement.even[gained].min())
    weakest = [block for block in gained if placement.even[block] <= there * 1.05]
    if not left:
        return f"blocks {format_blocks(weakest)} carry {there:.3g} tokens/s, and it has room for them"
    here = float(placement.even[left].min())
    if there < here:
        return f"blocks {format_blocks(weakest)} carry {there:.3g} tokens/s, {format_blocks(left)} carry {here:.3g}"
    few = int(placement.holders[gained].min())
    fewest = [block for block in gained if placement.holders[block] == few]
    servers = "one server" if few == 1 else f"{few} servers"
    return f"blocks {format_blocks(fewest)} have {servers}, {format_blocks(left)} can do without one"
