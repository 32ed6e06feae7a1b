"""Parallax' first phase (arXiv 2509.26182): pipelines of machines, and layers in proportion to power within each.

Machines are grouped into k disjoint pipelines that use as few stages as possible; k maximizes k² over the number of
stages. Within a pipeline, the blocks are shared out in proportion to the power of the machines, as far as they fit
(water filling). Machines that are left go to the blocks with the least power. The second phase is the choice of routes.

Their grouping is a dynamic program over how much each open pipeline lacks; here, a greedy one fills the pipeline that
lacks most with the largest machine that is left, for each k. Their power is the machine's arithmetic speed, here its
speed with one block.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.policy.machines.machine import Machine
from shoal.spans import Span


def parallax(machines: Sequence[Machine], num_blocks: int) -> dict[str, Span]:
    """The spans of the machines that are in pipelines."""
    best: list[list[Machine]] = []
    most = sum(min(machine.max_blocks, num_blocks) for machine in machines) // num_blocks
    for count in range(1, most + 1):
        pipelines = _pipelines(machines, num_blocks, count)
        if pipelines is None:
            break
        if not best or _score(pipelines) > _score(best):
            best = pipelines
    return {peer: span for pipeline in best for peer, span in fill(pipeline, num_blocks).items()}


def _score(pipelines: Sequence[Sequence[Machine]]) -> float:
    return len(pipelines) ** 2 / sum(len(pipeline) for pipeline in pipelines)


def _pipelines(machines: Sequence[Machine], num_blocks: int, count: int) -> list[list[Machine]] | None:
    """`count` disjoint groups, each of which can hold all blocks; `None` if that was not found."""
    pipelines: list[list[Machine]] = [[] for _ in range(count)]
    lacks = [num_blocks] * count
    left = sorted(machines, key=lambda machine: (-machine.max_blocks, machine.peer))
    while max(lacks) > 0:
        if not left:
            return None
        pipeline = lacks.index(max(lacks))
        # The smallest machine that completes the pipeline, if one does; else the largest.
        enough = [machine for machine in left if machine.max_blocks >= lacks[pipeline]]
        machine = enough[-1] if enough else left[0]
        left.remove(machine)
        pipelines[pipeline].append(machine)
        lacks[pipeline] -= machine.max_blocks
    return pipelines


def fill(pipeline: Sequence[Machine], num_blocks: int) -> dict[str, Span]:
    """The blocks of one pipeline: in proportion to power, within what fits, one machine after another."""
    lengths = water_fill(
        [machine.block_speed(1) for machine in pipeline],
        [min(machine.max_blocks, num_blocks) for machine in pipeline],
        num_blocks,
    )
    spans: dict[str, Span] = {}
    start = 0
    for machine, length in zip(pipeline, lengths, strict=True):
        if length:
            spans[machine.peer] = Span(start, start + length)
            start += length
    return spans


def water_fill(powers: Sequence[float], limits: Sequence[int], total: int) -> list[int]:
    """Whole numbers min(limit, λ power) whose sum is `total`. Raises `ValueError` if the limits do not allow it."""
    if sum(limits) < total:
        raise ValueError(f"the limits allow {sum(limits)} of {total}")
    low, high = 0.0, total / min(powers)
    for _ in range(60):
        level = (low + high) / 2
        filled = sum(min(limit, level * power) for power, limit in zip(powers, limits, strict=True))
        low, high = (low, level) if filled > total else (level, high)
    exact = [min(limit, low * power) for power, limit in zip(powers, limits, strict=True)]
    lengths = [int(each) for each in exact]
    # The rest goes to those that lost most by rounding down.
    order = sorted(range(len(exact)), key=lambda index: lengths[index] - exact[index])
    while sum(lengths) < total:
        for index in order:
            if lengths[index] < limits[index] and sum(lengths) < total:
                lengths[index] += 1
    return lengths
