"""The throughput that no placement can pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.policy.machines.fleet import Floats, Kinds, summed, tabulate
from shoal.policy.machines.machine import Machine

MAX_ROUNDS = 100
PRECISION = 1e-12


def throughput_bound(machines: Sequence[Machine], num_blocks: int) -> float:
    """Tokens per second that no placement of the machines can pass; 0 without machines.

    It is the largest λ with N λ ≤ Σ_s max_L min(C_s(L), L λ): at λ tokens per second a machine that holds L blocks has
    work for L λ at most, and computes and carries C_s(L) at most, wherever they are.
    """
    kinds, kind = tabulate(machines, num_blocks)
    counts = summed(kind, np.array([float(machine.count) for machine in machines]), len(kinds.longest))
    return bound_of(kinds, counts, num_blocks)


def bound_of(kinds: Kinds, counts: Floats, num_blocks: int) -> float:
    """The same of machines that were tabulated, `counts` of each kind."""
    capacity = np.where(kinds.allowed, kinds.capacity, 0.0)
    lengths = np.arange(capacity.shape[1])
    low, high = 0.0, float(counts @ capacity.max(axis=1)) / num_blocks
    level = high
    for _ in range(MAX_ROUNDS):
        useful = np.minimum(capacity, lengths * level)
        best = useful.argmax(axis=1)
        rows = np.arange(len(best))
        served = float(counts @ useful[rows, best])
        if served >= num_blocks * level:
            low = level
        else:
            high = level
        if high - low <= PRECISION * high or abs(served - num_blocks * level) <= PRECISION * served:
            return level
        # Newton's step on the pieces that are active now; the bracket guards it
        by_level = lengths[best] * level < capacity[rows, best]
        slope = float(counts @ np.where(by_level, lengths[best], 0))
        level = (served - slope * level) / (num_blocks - slope) if slope < num_blocks else low
        if not low < level < high:
            level = (low + high) / 2
    return low
