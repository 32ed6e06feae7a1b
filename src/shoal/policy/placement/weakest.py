"""What a small swarm looks at besides the graded score: the speed of its weakest block.

Servers that divide their time evenly carry what their weakest block carries ("min"). The graded score hardly sees it:
one block of many counts for little. In a small swarm, where each machine is a large part of all, few moves raise it
much. In a larger one, machines that come and go change it all the time, and moves after it cost more than they bring.

The speed of the weakest block is a number that depends on nothing but the placement, and so is its sum with the score:
moves that raise that sum come to an end. B changes, M machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.policy.machines.fleet import Fleet, Floats, Ints
from shoal.policy.placement.needed import Needed
from shoal.policy.placement.score import Changes, ScoredPlacement
from shoal.policy.placement.search import best_places

WEIGHT = 0.3
"""How much the weakest block weighs beside the score."""
MAX_MACHINES = 12
"""The most machines of a small swarm."""


def is_small(fleet: Fleet) -> bool:
    """Whether the weakest block counts: in a swarm of few machines that come and go."""
    return not fleet.quiet and float(fleet.counts.sum()) <= MAX_MACHINES


@dataclass(frozen=True)
class Weakest:
    """A placement in a small swarm, to be improved by single moves. `scores` and `score` include the weakest block."""

    placement: ScoredPlacement

    @property
    def score(self) -> float:
        """The score of the placement itself, with its weakest block."""
        return float(self.scores(Changes.none())[0])

    def scores(self, changes: Changes) -> Floats:
        """The score after each change, with the weakest block then. [B]"""
        return self.placement.scores(changes) + WEIGHT * self.speeds(changes)

    def speeds(self, changes: Changes) -> Floats:
        """What machines that divide time evenly do for the weakest block after each change; at most the bound. [B]"""
        placement = self.placement
        even = placement.even_after(changes, placement.held_before(changes), placement.held_after(changes))
        speeds: Floats = np.minimum(even.min(axis=1), placement.bound)
        return speeds

    def best_places(self, rows: Ints, *, most: int, each: int, needed: Needed) -> tuple[Changes, Floats]:
        """The most promising changes for the score; and the scores without the machines, as `scores` has them. [M]"""
        changes, without = best_places(self.placement, rows, most=most, each=each, needed=needed)
        return changes, without + WEIGHT * self.speeds(Changes.leave(rows))
