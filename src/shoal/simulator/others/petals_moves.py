"""PETALS' rules for joining and moving (`shoal.policy.placement.petals`), asked at random times as its code does."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass

from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.policy.placement.petals import LEAST_GAIN, choose_move
from shoal.simulator.fluid.rules import STAY, Decision, Steward, petals_span
from shoal.spans import Span

CHECK_SECONDS = 120.0
"""The mean time between two checks of a server (`mean_balance_check_period` in PETALS' code)."""


@dataclass(frozen=True)
class Petals:
    """PETALS' rules for joining and moving."""

    name: str = "PETALS"

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        return petals_span(machine, others, num_blocks)

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return PetalsSteward(num_blocks, rng)

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        return None


class PetalsSteward:
    """Checks at random intervals: it is not driven by events."""

    def __init__(self, num_blocks: int, rng: random.Random) -> None:
        self._num_blocks = num_blocks
        self._rng = rng
        self._next_check: float | None = None

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        if self._next_check is not None and now < self._next_check:
            return STAY
        is_first = self._next_check is None
        self._next_check = now + self._rng.expovariate(1 / CHECK_SECONDS)
        machines = (own, *others)
        if is_first or not may_gain(machines, self._num_blocks):
            return Decision(look_at=self._next_check)
        span = choose_move(machines, own.peer, self._num_blocks, rng=self._rng)
        return Decision(goes=span, look_at=None if span else self._next_check)

    def arrived(self, *, now: float) -> None:
        """Its next check is when it would have been."""


def may_gain(machines: Sequence[Machine], num_blocks: int) -> bool:
    """Whether the slowest block can gain enough at all: moves that keep lengths do not change the sum of all blocks."""
    throughputs = block_throughputs(machines, num_blocks)
    return min(throughputs) * (1 + LEAST_GAIN) < sum(throughputs) / num_blocks
