"""PETALS' rules of placement (arXiv 2312.08361, section 3.3 and appendix D): to compare with, and to choose by name."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.spans import Span


def choose_span(throughput: Sequence[float], *, num_blocks: int) -> Span:
    """The span of `num_blocks` where one more server helps the slowest blocks most (arXiv 2312.08361, appendix D).

    `throughput` is that of each block, in tokens per second.
    """
    starts = range(len(throughput) - num_blocks + 1)
    start = min(starts, key=lambda s: sorted(throughput[s : s + num_blocks]))
    return Span(start, start + num_blocks)
