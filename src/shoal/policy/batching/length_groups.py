"""Which sequences of different lengths are computed together, where a batch is as long as its longest sequence."""

from __future__ import annotations

from collections.abc import Sequence


def length_groups(lengths: Sequence[int], fixed_cost: float) -> list[list[int]]:
    """Groups of indices such that all groups together cost the least.

    A group costs `fixed_cost`, for reading the weights, and the tokens of its longest sequence for each of its
    sequences. A group has sequences of neighbouring lengths, so the best partition of the sorted lengths is the best.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    best: list[tuple[float, int]] = [(0.0, 0)]  # for the first n sequences: the cost, and where the last group starts
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [best[start][0] + fixed_cost + (end - start) * longest for start in range(end)]
        start = min(range(end), key=lambda index: costs[index])
        best.append((costs[start], start))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]
