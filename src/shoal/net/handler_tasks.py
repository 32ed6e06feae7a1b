"""Owns the tasks that run a transport's handler, one task for each stream that a peer opened."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from shoal.net.transport import Stream, StreamBroken, StreamHandler

logger = logging.getLogger(__name__)


class HandlerTasks:
    """Starts and ends the handlers' tasks. They are kept in the order in which they were started."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._num_by_peer: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._tasks)

    def num_of(self, peer: str) -> int:
        """How many streams of this peer are being handled."""
        return self._num_by_peer[peer]

    def start(self, handler: StreamHandler, stream: Stream) -> None:
        """Run `handler`, and close the stream when it returns or raises."""
        task = asyncio.create_task(self._run(handler, stream))
        self._tasks[task] = None
        self._num_by_peer[stream.peer] += 1
        task.add_done_callback(lambda task: self._forget(task, stream.peer))

    def cancel(self, *, include_current: bool = False) -> None:
        """Cancel the tasks without waiting for them. The one that calls this is spared unless it is included."""
        for task in self._tasks:
            if include_current or task is not asyncio.current_task():
                task.cancel()

    async def wait(self) -> None:
        """Wait until all tasks have ended, except the one that calls this."""
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)

    def _forget(self, task: asyncio.Task[None], peer: str) -> None:
        del self._tasks[task]
        self._num_by_peer[peer] -= 1
        if not self._num_by_peer[peer]:
            del self._num_by_peer[peer]

    async def _run(self, handler: StreamHandler, stream: Stream) -> None:
        try:
            await handler(stream)
        except StreamBroken as broken:
            logger.debug("%s", broken)
        except Exception as failure:
            logger.warning("a stream of %s failed: %r", stream.peer, failure)
        finally:
            await stream.close()
