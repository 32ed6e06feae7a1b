"""What a client waits for while no server computes some of its blocks, told to its observers.

Many calls may lack the same blocks, such as all microbatches of a batch. Their waits are told as one: when the first
begins, now and then, and when the last has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.concurrency import now
from shoal.errors import MissingBlocks, SwarmError
from shoal.events import Observers, WaitEnded, WaitingForBlocks

REMIND_SECONDS = 15.0
"""A wait is told again at this interval."""
NEWS_SECONDS = 5.0
"""The shortest time until it is told again because there is something new, such as a server that loads the blocks."""
SHORTEST_TOLD = 0.5
"""The error of a shorter wait does not mention it."""


@dataclass(frozen=True)
class Outage:
    """Why some `blocks` cannot be computed now: the `error` that the caller gets if that does not change.

    `outlook` is what may be expected, and `ready_in` in how many seconds, if servers say so. `loaders` are the peers
    that are loading some of the blocks. The client looks again after `look_seconds`.
    """

    blocks: tuple[int, ...]
    error: SwarmError
    outlook: str
    look_seconds: float
    ready_in: float | None = None
    loaders: frozenset[str] = frozenset()

    def error_after(self, seconds: float) -> SwarmError:
        """The error for a caller that has waited in vain."""
        if seconds < SHORTEST_TOLD or not isinstance(self.error, MissingBlocks):
            return self.error
        message = f"{self.error}; {self.outlook}" if self.loaders else str(self.error)
        hint = self.error.hint or "patience= (--patience) is how many seconds the client waits"
        return MissingBlocks(f"{message}; the client waited {seconds:.0f} s", blocks=self.blocks, hint=hint)


Tell = Callable[[Outage, float, float], None]
"""Tells that a call waits because of an outage, for how many seconds it has, and how many it is ready to wait."""


class Waits:
    """The calls of a client that wait, and the events of that."""

    def __init__(self, model: str, observers: Observers) -> None:
        self._model = model
        self._observers = observers
        self._outages: dict[object, Outage] = {}  # by call
        self._blocks: tuple[int, ...] = ()  # all that were lacking since the first of these calls began to wait
        self._began_at = self._told_at = 0.0
        self._told: tuple[tuple[int, ...], frozenset[str]] | None = None

    @contextlib.contextmanager
    def of_call(self) -> Iterator[Tell]:
        """While this is open, one call may tell that it waits. It goes on if there is no error at the end."""
        call, goes_on = object(), False
        try:
            yield lambda outage, waited, patience: self._tell(call, outage, waited, patience)
            goes_on = True
        finally:
            self._end(call, goes_on=goes_on)

    def _tell(self, call: object, outage: Outage, waited: float, patience: float) -> None:
        time = now()
        if not self._outages:
            self._began_at, self._told, self._blocks = time - waited, None, ()
        self._outages[call] = outage
        blocks = tuple(sorted({block for each in self._outages.values() for block in each.blocks}))
        self._blocks = tuple(sorted({*self._blocks, *blocks}))
        loaders = frozenset(peer for each in self._outages.values() for peer in each.loaders)
        is_new = self._told != (blocks, loaders) and time - self._told_at >= NEWS_SECONDS
        if self._told is None or is_new or time - self._told_at >= REMIND_SECONDS:
            self._told, self._told_at = (blocks, loaders), time
            reason = f"{outage.error}; {outage.outlook}"
            expected = None if outage.ready_in is None else max(0.0, outage.ready_in)
            self._observers.emit(
                WaitingForBlocks(self._model, blocks, reason, expected, time - self._began_at, patience)
            )

    def _end(self, call: object, *, goes_on: bool) -> None:
        if self._outages.pop(call, None) is not None and not self._outages:
            self._observers.emit(WaitEnded(self._model, self._blocks, now() - self._began_at, goes_on))
