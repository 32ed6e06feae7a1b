"""Where a machine that joins serves: the span, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from shoal.policy.machines.fleet import Fleet, Ints
from shoal.policy.machines.lifetime import Lifetimes
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.policy.placement.petals import choose_span
from shoal.policy.placement.plan import DEFAULT_SCORING
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.policy.placement.search import best_places
from shoal.policy.view import format_blocks
from shoal.spans import Span

if TYPE_CHECKING:
    import random

Rule: TypeAlias = Literal["graded", "petals"]
"""How a machine that joins chooses its span: by the graded score, or as PETALS does."""
PLACES_SCORED = 128


@dataclass(frozen=True)
class Placed:
    """The span that a machine takes, and why, for people."""

    span: Span
    reason: str


def choose_blocks(
    machine: Machine,
    others: Sequence[Machine],
    num_blocks: int,
    *,
    rule: Rule = "graded",
    min_blocks: int = 1,
    rng: random.Random,
    now: float = math.inf,
    lifetimes: Lifetimes | None = None,
    scoring: Scoring = DEFAULT_SCORING,
) -> Placed:
    """The best span for a machine that has none, of `min_blocks` up to as many blocks as it can hold.

    "graded" tries all lengths and takes the span after which the score is highest. "petals" takes as many blocks as
    fit, where the sorted throughputs are least. Spans that are equally good are drawn from by `rng`. Machines that are
    not ready at `now` count for less; by default all count fully.
    """
    others = [other for other in others if other.peer != machine.peer]
    throughputs = block_throughputs(others, num_blocks)
    longest = max(1, min(machine.max_blocks, num_blocks))
    if rule == "petals":
        span = choose_span(throughputs, num_blocks=longest)
    else:
        machine = replace(machine, span=None, max_blocks=longest, count=1)
        fleet = Fleet.of((machine, *others), num_blocks, now=now, lifetimes=lifetimes)
        row = next(index for index, each in enumerate(fleet.machines) if each.peer == machine.peer)
        placement = ScoredPlacement.of(fleet, scoring)
        rows = np.array([row])
        places, _ = best_places(
            placement, rows, most=PLACES_SCORED, each=PLACES_SCORED, min_blocks=min(min_blocks, longest)
        )
        scores = placement.scores(places)
        best = np.flatnonzero(scores >= scores.max() - 1e-8 * placement.bound)
        best = _leaving_no_gap(best, places, placement)
        chosen = int(best[rng.randrange(len(best))])
        span = Span(int(places.starts[chosen]), int(places.ends[chosen]))
    return Placed(span, _reason(span, throughputs))


def _leaving_no_gap(best: Ints, places: Changes, placement: ScoredPlacement) -> Ints:
    """Of equally good places, those that begin or end where other spans or the model do, if there are any.

    A span in the middle of a hole leaves two holes, which may be too short for the servers that come.
    """
    held = np.concatenate(([True], ~placement.holes, [True]))
    starts, ends = places.starts[best], places.ends[best]
    adjacent = held[starts] | held[ends + 1]
    return best[adjacent] if adjacent.any() else best


def _reason(span: Span, throughputs: Sequence[float]) -> str:
    holes = [block for block in span if throughputs[block] == 0]
    if holes:
        return f"blocks {format_blocks(holes)} had no server"
    least = min(throughputs[block] for block in span)
    weakest = [block for block in span if throughputs[block] <= least * 1.05]
    return f"blocks {format_blocks(weakest)} carried {least:.3g} tokens/s"
