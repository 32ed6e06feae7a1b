"""Owns the tasks that run a transport's handlers: one for each stream that a peer opened, as far as there is room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from shoal.net.addressing.addresses import network_of
from shoal.net.transport import Stream, StreamBroken, StreamHandler
from shoal.net.wire import codec
from shoal.policy.network.stream_room import OpenStream, Refused, ServedPeers, admission
from shoal.protocol import Failure

logger = logging.getLogger(__name__)

TELL_SECONDS = 1.0
"""How long a peer may take to hear why its stream ends."""
MAX_TOLD = 32
"""The peers that are being told so at a time. Others see that the stream has ended."""
RETRY_SECONDS = 5.0
"""When a peer for which there was no room may ask again."""


class HandlerTasks:
    """Starts and ends the handlers' tasks. They are kept in the order in which they were started.

    `policy.network.stream_room` says which streams are taken.
    """

    def __init__(self) -> None:
        self._streams: dict[asyncio.Task[None], Stream] = {}
        self._giving_way: set[asyncio.Task[None]] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self._served = ServedPeers()

    def __len__(self) -> int:
        return len(self._streams)

    def start(self, handler: StreamHandler, stream: Stream) -> None:
        """Run `handler`, and close the stream when it returns or raises.

        If there is no room for it, the stream is closed, or another one for it. The peer is told that this one is busy.
        """
        now = asyncio.get_running_loop().time()
        tasks = [*self._streams]
        verdict = admission(self._open_streams(tasks), self._open_stream(stream, now), now=now)
        if isinstance(verdict, Refused):
            logger.debug("a stream of %s is refused: %s", stream.peer, verdict.reason)
            self._tell(stream, verdict.reason, None)
            return
        if verdict.gives_way is not None:
            self._end(tasks[verdict.gives_way])
        task = asyncio.create_task(self._run(handler, stream))
        self._streams[task] = stream
        task.add_done_callback(self._forget)

    def cancel(self, *, include_current: bool = False) -> None:
        """Cancel the tasks without waiting for them. The one that calls this is spared unless it is included."""
        for task in self._tasks:
            if include_current or task is not asyncio.current_task():
                task.cancel()

    async def wait(self) -> None:
        """Wait until all tasks have ended, except the one that calls this."""
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)

    @property
    def _tasks(self) -> Sequence[asyncio.Task[None]]:
        return (*self._streams, *self._giving_way, *self._telling)

    def _open_streams(self, tasks: Sequence[asyncio.Task[None]]) -> list[OpenStream]:
        streams = [self._streams[task] for task in tasks]
        return [self._open_stream(stream, max(stream.heard_at, stream.taken_at)) for stream in streams]

    def _open_stream(self, stream: Stream, used_at: float) -> OpenStream:
        is_served = stream.has_served or stream.peer in self._served
        return OpenStream(stream.peer, network_of(stream.address), used_at, is_served)

    def _end(self, task: asyncio.Task[None]) -> None:
        """End a task because another stream needs its room."""
        stream = self._streams.pop(task)
        logger.debug("a stream of %s gives way", stream.peer)
        self._giving_way.add(task)
        self._tell(stream, "others need this stream", task)

    def _tell(self, stream: Stream, reason: str, task: asyncio.Task[None] | None) -> None:
        """Tell a peer why its stream ends, close it, and cancel its task if it has one. Waits for nothing."""
        telling = asyncio.create_task(self._told(stream, reason, task, is_told=len(self._telling) < MAX_TOLD))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _told(self, stream: Stream, reason: str, task: asyncio.Task[None] | None, *, is_told: bool) -> None:
        try:
            if is_told:
                with contextlib.suppress(StreamBroken, TimeoutError):
                    async with asyncio.timeout(TELL_SECONDS):
                        await codec.send(stream, Failure(code="busy", reason=reason, retry_after=RETRY_SECONDS))
        finally:
            if task is not None:
                task.cancel()
            await stream.close()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._giving_way.discard(task)
        self._streams.pop(task, None)

    async def _run(self, handler: StreamHandler, stream: Stream) -> None:
        try:
            await handler(stream)
        except StreamBroken as broken:
            logger.debug("%s", broken)
        except Exception as failure:
            logger.warning("a stream of %s failed: %r", stream.peer, failure)
        finally:
            if stream.has_served:
                self._served = self._served.with_served(stream.peer, network_of(stream.address))
            await stream.close()
