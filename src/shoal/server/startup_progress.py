"""The phases of a server's start, for people who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from shoal.server.executor import Executor
from shoal.spans import Span


class Phase(StrEnum):
    """What a server is doing, in this order; blocks are either loaded or quantized. The values are shown to people."""

    OPENING = "Looking at the model"
    FINGERPRINTING = "Fingerprinting the weights"
    LOADING = "Loading the blocks"
    QUANTIZING = "Quantizing the blocks"
    MEASURING = "Measuring the speed"
    ANNOUNCING = "Announcing the blocks"


@dataclass(frozen=True)
class Progress:
    """A phase and, while blocks are loaded, the block that is next: the first of `num_blocks` is 1."""

    phase: Phase
    block: int | None = None
    num_blocks: int | None = None

    @property
    def step(self) -> str:
        """How far the phase is, such as "2 of 8"; empty if that is not known."""
        return "" if self.block is None else f"{self.block} of {self.num_blocks}"


Report = Callable[[Progress], None]


def reporter(report: Report, executor: Executor, span: Span) -> Callable[[int, bool], None]:
    """What the compute thread calls for each weight that it loads. `report` is called once a block, by the event loop.

    The callback's arguments are the block and whether its weights are quantized now. It raises `Abandoned` once the
    start is cancelled.
    """
    loop = asyncio.get_running_loop()
    last: Progress | None = None

    def on_weight(block: int, quantizes: bool) -> None:
        nonlocal last
        executor.check()
        phase = Phase.QUANTIZING if quantizes else Phase.LOADING
        progress = Progress(phase, block - span.start + 1, len(span))
        if progress != last:
            last = progress
            loop.call_soon_threadsafe(report, progress)

    return on_weight
