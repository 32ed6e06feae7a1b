"""PETALS' rules of placement (arXiv 2312.08361, section 3.3 and appendix D): to compare with, and to choose by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.spans import Span

if TYPE_CHECKING:
    import random

LEAST_GAIN = 0.2
"""The bottleneck gains at least so much by a move and what others do after it."""
MAX_ROUNDS = 100
"""Rounds of greedy moves that are simulated at most. They end much earlier, unless two servers swap for ever."""
PRECISION = 1e-6
"""Throughputs that differ by less are equal: sums in another order differ a little."""


def choose_span(throughput: Sequence[float], *, num_blocks: int) -> Span:
    """The span of `num_blocks` where one more server helps the slowest blocks most (arXiv 2312.08361, appendix D).

    `throughput` is that of each block, in tokens per second.
    """
    starts = range(len(throughput) - num_blocks + 1)
    start = min(starts, key=lambda s: sorted(throughput[s : s + num_blocks]))
    return Span(start, start + num_blocks)


def choose_move(machines: Sequence[Machine], peer: str, num_blocks: int, *, rng: random.Random) -> Span | None:
    """The span that a server moves to, or `None` if it stays. Spans keep their length.

    The server simulates its own best move and then those of all, in rounds of random order, until none moves. It moves
    if the throughput of the slowest block is then a fifth higher than now, and never if a block that it leaves has no
    other holder.
    """
    throughput = block_throughputs(machines, num_blocks)
    own = next((machine for machine in machines if machine.peer == peer), None)
    if own is None or own.span is None or not own.movable:
        return None
    spans = {index: machine.span for index, machine in enumerate(machines) if machine.span is not None}
    index = next(i for i, machine in enumerate(machines) if machine.peer == peer)
    without = block_throughputs([machine for machine in machines if machine.peer != peer], num_blocks)
    if any(without[block] == 0 for block in own.span):
        return None
    target = choose_span(without, num_blocks=len(own.span))
    if target == own.span:
        return None
    after = list(throughput)
    _shift(after, own, own.span, target)
    spans[index] = target
    order = [i for i in spans if machines[i].movable]
    for _ in range(MAX_ROUNDS):
        rng.shuffle(order)
        moved = False
        for i in order:
            machine, span = machines[i], spans[i]
            _shift(after, machine, span, None)
            best = choose_span([round(t, 6) for t in after], num_blocks=len(span))
            # a place that is no better than the present one is no reason to move
            if _weakest(after, best) < _weakest(after, span):
                spans[i], moved = best, True
            _shift(after, machine, None, spans[i])
        if not moved:
            break
    return target if min(after) >= min(throughput) * (1 + LEAST_GAIN) + PRECISION else None


def _weakest(throughput: Sequence[float], span: Span) -> list[float]:
    return sorted(round(throughput[block], 6) for block in span)


def _shift(throughput: list[float], machine: Machine, before: Span | None, after: Span | None) -> None:
    """Take a machine's speed off the blocks of one span and add it to those of another."""
    for span, sign in ((before, -1), (after, 1)):
        for block in span or ():
            throughput[block] += sign * machine.speed(len(span or ())) * machine.count
