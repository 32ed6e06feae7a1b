"""What small and roomy swarms look at besides the graded score: the speed of their weakest block.

Servers that divide their time evenly carry what their weakest block carries ("min"). The graded score hardly sees it:
one block of many counts for little. In a small swarm, where each machine is a large part of all, few moves raise it
much. In a larger one, machines that come and go change it all the time, and moves after it cost more than they bring,
unless the swarm is roomy: where the machines hold each block several times, all of them carry what they can together
anyway, and moves need not bring more of that. There it is enough that the weakest block has most of the bound: the rest
would cost twice the moves. In a very large swarm each block has so many holders that chance evens them out.

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

SMALL_MACHINES = 12
"""The most machines of a small swarm."""
SMALL_WEIGHT = 0.3
"""How much the weakest block weighs beside the score in a small swarm."""
ROOMY_COPIES = 4.0
"""How often the machines of a roomy swarm hold each block, at least."""
ROOMY_MACHINES = 100
"""The most machines of a roomy swarm."""
ROOMY_WEIGHT = 0.2
"""How much the weakest block weighs in a roomy swarm, which is not small."""
ENOUGH = 0.77
"""The part of the bound that the weakest block of a roomy swarm should have."""


def is_small(fleet: Fleet) -> bool:
    """Whether it is a swarm of few machines that come and go."""
    return not fleet.quiet and float(fleet.counts.sum()) <= SMALL_MACHINES


def is_roomy(fleet: Fleet) -> bool:
    """Whether machines that come and go hold each block several times, with the lengths at which they compute most."""
    if fleet.quiet or float(fleet.counts.sum()) > ROOMY_MACHINES:
        return False
    kinds = fleet.kinds
    is_best = kinds.allowed & (kinds.capacity >= kinds.best[:, None] * (1 - 1e-9))
    longest = is_best.shape[1] - 1 - is_best[:, ::-1].argmax(axis=1)
    return float(longest[fleet.kind] @ fleet.counts) >= ROOMY_COPIES * fleet.num_blocks


def weakest_counts(fleet: Fleet) -> bool:
    """Whether moves also raise the speed of the weakest block."""
    return is_small(fleet) or is_roomy(fleet)


@dataclass(frozen=True)
class Weakest:
    """A placement to be improved by single moves. `scores` and `score` include the weakest block."""

    placement: ScoredPlacement

    @property
    def score(self) -> float:
        """The score of the placement itself, with its weakest block."""
        return float(self.scores(Changes.none())[0])

    def scores(self, changes: Changes) -> Floats:
        """The score after each change, with the weakest block then. [B]"""
        return self.placement.scores(changes) + self._worth(changes)

    def speeds(self, changes: Changes) -> Floats:
        """What machines that divide time evenly do for the weakest block after each change; at most the bound. [B]"""
        placement = self.placement
        even = placement.even_after(changes, placement.held_before(changes), placement.held_after(changes))
        speeds: Floats = np.minimum(even.min(axis=1), placement.bound)
        return speeds

    def best_places(self, rows: Ints, *, most: int, each: int, needed: Needed) -> tuple[Changes, Floats]:
        """The most promising changes for the score; and the scores without the machines, as `scores` has them. [M]"""
        changes, without = best_places(self.placement, rows, most=most, each=each, needed=needed)
        return changes, without + self._worth(Changes.leave(rows))

    def _worth(self, changes: Changes) -> Floats:
        """What the weakest block adds to the score after each change. [B]"""
        if is_small(self.placement.fleet):
            return SMALL_WEIGHT * self.speeds(changes)
        return ROOMY_WEIGHT * np.minimum(self.speeds(changes), ENOUGH * self.placement.bound)
