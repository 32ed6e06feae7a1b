"""When a PETALS server moves (arXiv 2312.08361, appendix D; its code, `server/block_selection.py`).

From time to time, a server imagines that it moves to where the swarm is weakest, and then that all servers move one
after another until none wants to. It moves if the weakest block would gain at least 20 %, and never if its leaving
would open a hole. The length of its span never changes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.policy.placement.machines import Machine
from shoal.policy.placement.petals import choose_span
from shoal.simulator.fluid.rules import STAY, Decision, Steward, petals_span
from shoal.spans import Span

GAIN = 0.2
CHECK_SECONDS = 120.0
"""The mean time between two checks of a server (its code's `mean_balance_check_period`)."""
MOST_ROUNDS = 10
"""The most times that all servers are imagined to move: their code goes on until none moves, which may be never."""


@dataclass@dataclass(frozen=True)
class Petals:
    """PETALS' rules for joining and moving."""

    name: str = "PETALS"
    gain: float = GAIN

    def join(self, machine: Machine, others: Sequence[Machine], num_blocks: int, rng: random.Random) -> Span:
        return petals_span(machine, others, num_blocks)

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return PetalsSteward(num_blocks, rng, self.gain)


class PetalsSteward:
    """Checks at random intervals, as PETALS does: it is not driven by events."""

    def __init__(self, num_blocks: int, rng: random.Random, gain: float) -> None:
        self._num_blocks = num_blocks
        self._rng = rng
        self._gain = gain
        self._next_check: float | None = None

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        if self._next_check is None:  # it has just come online
            self._next_check = now + self._rng.expovariate(1 / CHECK_SECONDS)
            return Decision(look_at=self._next_check)
        if now < self._next_check:
            return STAY
        self._next_check = now + self._rng.expovariate(1 / CHECK_SECONDS)
        span = better_span((own, *others), own.peer, self._num_blocks, gain=self._gain, rng=self._rng)
        return Decision(goes=span, look_at=None if span else self._next_check)

    def arrived(self, *, now: float) -> None:
        """Its next check is when it would have been."""


def better_span(
    machines: Sequence[Machine], peer: str, num_blocks: int, *, gain: float, rng: random.Random
) -> Span | None:
    """The span to which the server `peer` moves by PETALS' rule; `None` if it stays."""
    spans = {machine.peer: machine.span for machine in machines if machine.span is not None}
    speeds = {machine.peer: machine.speed(len(spans[machine.peer])) for machine in machines if machine.peer in spans}
    if peer not in spans:
        return None
    total = [0.0] * num_blocks
    for each, span in spans.items():
        _add(total, span, speeds[each])
    before = min(total)
    mean = sum(total) / num_blocks
    if before * (1 + gain) >= mean:
        return None  # moves do not change the sum, so the weakest block cannot gain that much
    own = spans[peer]
    _add(total, own, -speeds[peer])
    if before > _ZERO and min(total) <= _ZERO:
        return None
    goal = choose_span(total, num_blocks=len(own))
    if goal == own:
        return None
    _add(total, goal, speeds[peer])
    spans[peer] = goal
    others = list(spans)
    for _ in range(MOST_ROUNDS):
        rng.shuffle(others)
        if not _round(total, spans, speeds, others):
            break
    return goal if min(total) > _ZERO and min(total) >= before * (1 + gain) else None


_ZERO = 1e-6
"""Sums of speeds that were added and taken away again are not exact."""


def _round(total: list[float], spans: dict[str, Span], speeds: dict[str, float], order: Sequence[str]) -> bool:
    """Each server moves to where it likes best; whether one moved."""
    moved = False
    for peer in order:
        span, speed = spans[peer], speeds[peer]
        _add(total, span, -speed)
        best = choose_span(total, num_blocks=len(span))
        # Where it is counts as equal to a place that is better by a rounding error only.
        if best != span and _weakest(total, best) < _weakest(total, span) - _ZERO:
            spans[peer], moved = best, True
        _add(total, spans[peer], speed)
    return moved


def _weakest(total: Sequence[float], span: Span) -> float:
    return min(total[span.start : span.end])


def _add(total: list[float], span: Span, speed: float) -> None:
    for block in span:
        total[block] += speed
