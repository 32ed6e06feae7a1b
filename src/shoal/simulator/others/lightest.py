"""Parallax' rule for one newcomer (arXiv 2509.26182): it begins at the block with the least power."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.spans import Span


def lightest_span(machine: Machine, others: Sequence[Machine], num_blocks: int) -> Span:
    """As many blocks as fit, from the first of the weakest ones on; near the end, the last ones."""
    power = block_throughputs(others, num_blocks)
    length = min(machine.max_blocks, num_blocks)
    start = min(power.index(min(power)), num_blocks - length)
    return Span(start, start + length)
