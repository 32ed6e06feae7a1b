"""Whose adapter is read next: that takes another thread milliseconds, in which it slows down the compute thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from shoal.policy.batching.fair_queueing import FairQueue
from shoal.server.engine.loop import EngineLoop
from shoal.server.refusals import too_many

MAX_WAITING = 64
"""Adapters of one payer that may wait: a client sends one for each block, over a few connections."""


class AdapterTurns:
    """Lets one adapter be read at a time, those first whose payers have used least.

    While others compute, half of the time goes by without any.
    """

    def __init__(self, loop: EngineLoop, *, clock: Callable[[], float] | None = None) -> None:
        self._loop = loop
        self._clock = clock or asyncio.get_running_loop().time
        self._used = FairQueue()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._is_reading = False
        self._free_at = float("-inf")

    @contextlib.asynccontextmanager
    async def turn(self, payer: str) -> AsyncIterator[None]:
        """An adapter of this payer is read in this context. Raises `Refused` while too many of its adapters wait."""
        if sum(each == payer for each, _ in self._waiting) >= MAX_WAITING:
            raise too_many(f"{MAX_WAITING} adapters", payer)
        place = payer, asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._begin_next()
        try:
            await place[1]
        except asyncio.CancelledError:
            if place in self._waiting:
                self._waiting.remove(place)
            else:
                self._end()
            raise
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self._used = self._used.charged({payer: seconds}, waiting={payer, *(each for each, _ in self._waiting)})
            self._loop.charge(payer, seconds)
            if self._loop.others_than(payer):
                self._free_at = self._clock() + seconds
            self._end()

    def _end(self) -> None:
        self._is_reading = False
        self._begin_next()

    def _begin_next(self) -> None:
        if self._is_reading or not self._waiting:
            return
        if (wait := self._free_at - self._clock()) > 0:
            asyncio.get_running_loop().call_later(wait, self._begin_next)
            return
        payers = {payer for payer, _ in self._waiting}
        place = min(self._waiting, key=lambda each: self._used.of(each[0]) if len(payers) > 1 else 0.0)
        self._waiting.remove(place)
        self._is_reading = True
        if not place[1].done():
            place[1].set_result(None)
