"""What a server does before it serves, in words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from shoal.server.executor import Executor
from shoal.spans import Span


class Phase(StrEnum):
    """In this order, apart from the two ways of loading; the values are for people."""

    OPENING = "Looking at the model"
    FINGERPRINTING = "Fingerprinting the weights"
    LOADING = "Loading the blocks"
    QUANTIZING = "Quantizing the blocks"
    MEASURING = "Measuring the speed"
    ANNOUNCING = "Announcing the blocks"


@dataclass(frozen=True)
class Progress:
    """A phase and, if it goes from block to block, the one that it has come to: the first is 1."""

    phase: Phase
    block: int | None = None
    num_blocks: int | None = None

    @property
    def step(self) -> str:
        """How far the phase is; empty if that is not known."""
        return "" if self.block is None else f"{self.block} of {self.num_blocks}"


Report = Callable[[Progress], None]


def reporter(report: Report, executor: Executor, span: Span) -> Callable[[int, bool], None]:
    """What the compute thread calls for each weight that it loads: the event loop hears of each block once.

    It raises `Abandoned` when nobody waits for the blocks any more.
    """
    loop = asyncio.get_running_loop()
    last: Progress | None = None

    def heard(block: int, quantizes: bool) -> None:
        nonlocal last
        executor.check()
        phase = Phase.QUANTIZING if quantizes else Phase.LOADING
        progress = Progress(phase, block - span.start + 1, len(span))
        if progress != last:
            last = progress
            loop.call_soon_threadsafe(report, progress)

    return heard
