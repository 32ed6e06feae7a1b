"""The shared plan: which machines move, and where. All servers compute it alike, and each does its own step of it.

A plan is a list of moves, each the best single one after those before it. A move must raise the score of the placement
(`score.py`), which does not depend on time once all machines have loaded: so plans come to an end.

No move opens a hole. A machine leaves blocks only if each of them has another server that is online and keeps them by
the same plan; blocks that it keeps itself while it loads others need none (`needed.py`). That other server must be one
whose claim is plausible: a machine that claims to hold everything, where the others hold parts, moves no machine off
the blocks that it claims. To fill a hole, a machine also leaves blocks to a doubted machine, if that one does not claim
all blocks.

In small and roomy swarms moves also raise the speed of the weakest block (`weakest.py`). In a quiet one (`Fleet.quiet`)
gains last: moves also raise what all blocks can get at once (`refining.py`). Where no single move gains any more, two
may: a plan then begins with a move that loses a little, so that the best move after it gains more than that. That
second move is the best one for every server that sees the first one done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shoal.policy.machines.fleet import Flags, Fleet, Floats, Ints
from shoal.policy.machines.lifetime import Lifetimes
from shoal.policy.machines.machine import Machine
from shoal.policy.placement.needed import Needed
from shoal.policy.placement.refining import Refined, is_refinable
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.policy.placement.search import best_places, most_promising
from shoal.policy.placement.weakest import Weakest, is_small, weakest_counts
from shoal.policy.view import format_blocks
from shoal.spans import Span

MAX_MOVES = 8
"""The most moves of a plan. What is left to do is in the next one."""
LEAST_GAIN = 0.04
"""A move gains at least this part of what the machine can add to the swarm: the next change may undo smaller gains."""
SMALL_LEAST_GAIN = 0.16
"""The same in a small swarm, where the speed of the weakest block counts too: each change of the swarm changes it."""
QUIET_LEAST_GAIN = 0.0002
"""In a quiet swarm (`Fleet.quiet`), where gains last, a move gains at least this part of the bound."""
FIRST_STEPS = 8
"""The moves that lose least, from which two moves are tried where no single one gains anything."""
MAX_MOVERS = 128
"""The entries whose moves are compared, where there are more. With 48, swarms of 100 machines stopped far earlier."""
PLACES_SCORED = 96
"""The places that are scored for each move."""
PLACES_EACH = 12
"""The places of one entry among them, at most."""
QUIET_MAX_MOVES = 2
"""The most moves of a plan in a quiet swarm, where nothing is urgent and each takes longer to find."""
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
    if is_refinable(fleet):
        max_moves = min(max_moves, QUIET_MAX_MOVES)
    while len(moves) < max_moves:
        found = _best_move(placement, rank=len(moves))
        if found is None and not moves and is_refinable(fleet):
            found = _first_of_two(placement)
        if found is None:
            break
        row, move = found
        moves.append(move)
        placement = _after_move(placement, row, move)
    return tuple(moves)


def _after_move(placement: ScoredPlacement, row: int, move: Move) -> ScoredPlacement:
    return ScoredPlacement.of(placement.fleet.moved(row, move.after), placement.scoring, placement.bound)


@dataclass(frozen=True)
class _Options:
    """Moves of one machine each, and what the score would be; `without` are the scores while the machines load."""

    score: float
    places: Changes
    after: Floats
    without: Floats
    needed: Needed
    needed_to_fill: Needed


def _options(placement: ScoredPlacement) -> _Options | None:
    """The most promising moves; `None` if no machine can move."""
    fleet = placement.fleet
    needed = Needed.of(fleet, ~fleet.doubted)
    needed_to_fill = Needed.of(fleet, ~fleet.whole) if placement.holes.any() else needed
    rows = most_promising(
        placement, _one_of_each(fleet, np.flatnonzero(fleet.movable & (fleet.lengths > 0))), MAX_MOVERS
    )
    if len(rows) == 0 or placement.bound == 0:
        return None
    judged: ScoredPlacement | Refined | Weakest
    if is_refinable(fleet):
        judged = refined = Refined.of(placement)
        places, without = refined.best_places(rows, most=PLACES_SCORED, each=PLACES_EACH, needed=needed_to_fill)
    elif weakest_counts(fleet):
        judged = weakest = Weakest(placement)
        places, without = weakest.best_places(rows, most=PLACES_SCORED, each=PLACES_EACH, needed=needed_to_fill)
    else:
        judged = placement
        places, without = best_places(placement, rows, most=PLACES_SCORED, each=PLACES_EACH, needed=needed_to_fill)
    if len(places.rows) == 0:
        return None
    without = without[np.searchsorted(rows, places.rows)]
    return _Options(judged.score, places, judged.scores(places), without, needed, needed_to_fill)


def _best_move(placement: ScoredPlacement, *, rank: int) -> tuple[int, Move] | None:
    """The best move of one machine, and the entry of that machine."""
    options = _options(placement)
    if options is None:
        return None
    fleet, places, score, after = placement.fleet, options.places, options.score, options.after
    filled = np.concatenate(([0], np.cumsum(placement.holes)))
    num_filled = filled[places.ends] - filled[places.starts]
    fills = num_filled > 0
    loading, keeps = _loading(fleet, places)
    meanwhile = np.where(keeps, score, options.without)
    # the mean score of the time that counts, less that of staying
    value = loading * meanwhile + (1 - loading) * after - score
    gain = after - score
    pays = (value > 0) & (gain >= _least_gain(placement)[places.rows]) & options.needed.allows(places)
    allowed = (fills & (gain > 0) & options.needed_to_fill.allows(places)) | (~fills & pays)
    if not allowed.any():
        return None
    if (fills & allowed).any():  # however long they take to load: a swarm with a hole carries nothing
        allowed &= num_filled == num_filled[allowed].max()
    # rounded, so that sums in another order do not lead to another choice: of equal moves, the first is the best
    worth = np.round(value / (placement.bound * 1e-8))
    best = int(np.where(allowed, worth, -np.inf).argmax())
    return int(places.rows[best]), _move(placement, places, best, gain=float(gain[best]), rank=rank)


def _first_of_two(placement: ScoredPlacement) -> tuple[int, Move] | None:
    """The first of the two moves that gain most together, where no single move gains anything.

    Its `gain` is that of both.
    """
    options = _options(placement)
    if options is None:
        return None
    allowed = np.flatnonzero(options.needed.allows(options.places))
    losses = np.round((options.score - options.after[allowed]) / (placement.bound * 1e-8))
    best: tuple[int, Move] | None = None
    for index in allowed[np.argsort(losses, kind="stable")[:FIRST_STEPS]]:
        loss = options.score - float(options.after[index])
        row, first = int(options.places.rows[index]), _move(placement, options.places, int(index), gain=-loss, rank=0)
        second = _best_move(_after_move(placement, row, first), rank=1)
        if second is None:
            continue
        gain = second[1].gain - loss
        if gain >= 2 * QUIET_LEAST_GAIN * placement.bound and (best is None or gain > best[1].gain):
            best = row, replace(first, gain=gain, reason=f"{second[1].peer} can then go to {second[1].after}")
    return best


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
    """For which part of the time that counts each machine would load, and whether it would serve meanwhile."""
    moves = [
        (fleet.machines[row], Span(start, end))
        for row, start, end in zip(places.rows.tolist(), places.starts.tolist(), places.ends.tolist(), strict=True)
    ]
    seconds = np.array([machine.seconds_to_load(span) for machine, span in moves])
    keeps = np.array([machine.keeps(span) is not None for machine, span in moves], np.bool_)
    return np.clip(seconds / fleet.horizon, 0.0, 1.0), keeps


def _least_gain(placement: ScoredPlacement) -> Floats:
    """What a move of one machine of each entry must gain: a part of its share of what all can do."""
    fleet = placement.fleet
    if fleet.quiet:
        return np.full(len(fleet.kind), QUIET_LEAST_GAIN * placement.bound)
    best = fleet.kinds.best[fleet.kind]
    part = SMALL_LEAST_GAIN if is_small(fleet) else LEAST_GAIN
    least: Floats = part * placement.bound * best / max(float(best @ fleet.counts), 1e-300)
    return least


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
        return f"blocks {format_blocks(fills)} had no server"
    gained = [block for block in after if block not in before]
    left = [block for block in before if block not in after]
    if not gained:
        return f"with fewer blocks, {after}, it computes more for each"
    there = float(placement.even[gained].min())
    weakest = [block for block in gained if placement.even[block] <= there * 1.05]
    if not left:
        return f"blocks {format_blocks(weakest)} carried {there:.3g} tokens/s, and it has room for them"
    here = float(placement.even[left].min())
    if there < here:
        return f"blocks {format_blocks(weakest)} carried {there:.3g} tokens/s, {format_blocks(left)} carried {here:.3g}"
    few = int(placement.holders[gained].min())
    fewest = [block for block in gained if placement.holders[block] == few]
    servers = "one server" if few == 1 else f"{few} servers"
    return f"blocks {format_blocks(fewest)} have {servers}, {format_blocks(left)} can do without one"
