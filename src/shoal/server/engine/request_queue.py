"""What waits for the compute thread, and the news of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from shoal.server.engine.requests import PassRequest, StepRequest, settle


class RequestQueue:
    """The steps and the single passes that wait or are computed, but for those whose caller is gone."""

    def __init__(self) -> None:
        self._steps: list[StepRequest] = []
        self._passes: list[PassRequest[Any]] = []
        self._news = asyncio.Event()

    @property
    def steps(self) -> list[StepRequest]:
        """The steps, in the order in which they came."""
        self._steps = [step for step in self._steps if not step.result.done()]
        return self._steps

    @property
    def passes(self) -> list[PassRequest[Any]]:
        """The single passes, in the order in which they came."""
        self._passes = [request for request in self._passes if not request.result.done()]
        return self._passes

    def add_step(self, step: StepRequest) -> None:
        """One more step waits."""
        self._steps.append(step)
        self.wake()

    def add_pass(self, request: PassRequest[Any]) -> None:
        """One more single pass waits."""
        self._passes.append(request)
        self.wake()

    def fail(self, error: Exception) -> None:
        """Tell all callers of an error."""
        for step in self.steps:
            settle(step.result, error)
        for request in self.passes:
            settle(request.result, error)

    def wake(self) -> None:
        """Something has changed: there may be more to compute, or room for steps that wait."""
        self._news.set()

    def forget_news(self) -> None:
        """What has changed until now is no news any more."""
        self._news.clear()

    async def wait_for_news(self, seconds: float | None) -> None:
        """Wait until something has changed since `forget_news`, at most this long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
