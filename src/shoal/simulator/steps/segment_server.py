"""A simulated server that computes what waits for it together, as the live engine does.

session A, blocks 0:4   ████          a pass reads each block once, for the rows of all sessions that use it:
session B, blocks 0:8   ████████      blocks 0:4 with two rows, blocks 4:8 with one
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shoal.simulator.timeline import Timeline
from shoal.spans import Span

PREFILL_ROWS = 256
"""The most rows of prompts and training in one pass: more would keep decoding sessions waiting."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass: `per_block` for each block that is read, `per_row` for each row in each block, and `fixed`."""

    per_block: float
    per_row: float
    fixed: float = 0.0

    def seconds(self, blocks_read: int, rows_times_blocks: float) -> float:
        """How long a pass takes; `rows_times_blocks` is the sum over its blocks of the rows that go through each."""
        return self.fixed + self.per_block * blocks_read + self.per_row * rows_times_blocks


@dataclass(eq=False)
class Work:
    """Rows of one session that wait. `done` is called when all are computed; never, if the server stops before."""

    span: Span
    rows: float
    decodes: bool
    done: Callable[[], None]


class Cores:
    """The cores of a machine that several servers share: a pass that finds none free waits for its turn."""

    def __init__(self, timeline: Timeline, num_cores: int) -> None:
        self._timeline = timeline
        self._free = num_cores
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """Compute for so long on one core, now or when one is free."""
        if not self._free:
            self._waiting.append((seconds, done))
            return
        self._free -= 1
        self._timeline.after(seconds, lambda: self._end(done))

    def _end(self, done: Callable[[], None]) -> None:
        self._free += 1
        if self._waiting:
            self.run(*self._waiting.popleft())
        done()


class SegmentServer:
    """Passes one after another. Each takes all decoding rows that wait, and prompts by their order up to a limit."""

    def __init__(self, timeline: Timeline, cost: Cost, *, held: Span | None = None, cores: Cores | None = None) -> None:
        self.cost = cost
        self._held = held
        self.busy_seconds = 0.0
        self._timeline = timeline
        self._cores = cores or Cores(timeline, 1)
        self._steps: list[Work] = []
        self._prefills: deque[Work] = deque()
        self._computing = False
        self._stopped = False

    @property
    def queue_length(self) -> int:
        """How many steps and passes wait."""
        return len(self._steps) + len(self._prefills)

    def holds(self, span: Span) -> bool:
        """Whether it has these blocks. It has all if it was made without `held`."""
        return self._held is None or span in self._held

    def submit(self, work: Work) -> None:
        """Compute this soon. A stopped server drops it."""
        if self._stopped:
            return
        if work.decodes:
            self._steps.append(work)
        else:
            self._prefills.append(work)
        if not self._computing:
            self._begin()

    def stop(self) -> None:
        """What waits and what is computed now is lost."""
        self._stopped = True
        self._steps.clear()
        self._prefills.clear()

    def _begin(self) -> None:
        taken: list[tuple[Work, float]] = [(work, work.rows) for work in self._steps]
        self._steps = []
        room = float(PREFILL_ROWS)
        for work in self._prefills:
            if room <= 0:
                break
            taken.append((work, min(room, work.rows)))
            room -= work.rows
        if not taken:
            return
        read, weighted = 0, 0.0
        for work, rows in taken:
            read |= ((1 << len(work.span)) - 1) << work.span.start
            weighted += rows * len(work.span)
        seconds = self.cost.seconds(read.bit_count(), weighted)
        self._computing = True
        self.busy_seconds += seconds
        self._cores.run(seconds, lambda: self._end(taken))

    def _end(self, taken: list[tuple[Work, float]]) -> None:
        self._computing = False
        if self._stopped:
            return
        finished: list[Work] = []
        for work, rows in taken:
            work.rows -= rows
            if work.rows <= 0:
                finished.append(work)
        while self._prefills and self._prefills[0].rows <= 0:
            self._prefills.popleft()
        # What comes at this very moment still joins the next pass.
        self._timeline.after(0.0, self._begin_next)
        self._computing = True
        for work in finished:
            work.done()

    def _begin_next(self) -> None:
        self._computing = False
        if not self._stopped:
            self._begin()
