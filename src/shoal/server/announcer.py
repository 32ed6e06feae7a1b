"""A server's record in the directory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from shoal.errors import SwarmError
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState

log = logging.getLogger(__name__)

RENEWALS_PER_LIFETIME = 3
"""A record lives as long as so many renewals take: one may fail, and a server that vanished is forgotten soon."""


GOODBYE_SECONDS = 3.0
"""What the goodbye may take: a peer that leaves at the same time may never answer, and the record ends anyway."""


class Announcer:
    """Keeps a server's record fresh while the context lasts, and takes it back at the end, so that nobody waits."""

    def __init__(self, node: Node, model: ModelInfo, info: ServerInfo, *, every_seconds: float) -> None:
        self._directory = node.directory
        self._model = model
        self._describe: Callable[[], ServerInfo] = lambda: info
        self._every_seconds = every_seconds
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._announcing = asyncio.Lock()
        self._is_cut_off = False

    async def set_description(self, describe: Callable[[], ServerInfo]) -> None:
        """From now on the record is what `describe` says at each renewal."""
        self._describe = describe
        await self._announce(describe())

    def announce_soon(self) -> None:
        """Something is worth announcing before it is time."""
        self._news.set()

    async def __aenter__(self) -> Self:
        await self._announce(self._describe())
        self._task = asyncio.create_task(self._renew())
        return self

    async def leave(self) -> None:
        """Take the record back. May be called twice."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._announce(replace(self._describe(), state=ServerState.LEAVING))
        except TimeoutError:
            log.info("not everybody could be told within %g s that this server leaves", GOODBYE_SECONDS)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.leave()

    async def _renew(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_seconds):
                    await self._news.wait()
            self._news.clear()
            await self._announce(self._describe())

    async def _announce(self, info: ServerInfo) -> None:
        async with self._announcing:  # an older one that comes later is refused
            try:
                await self._directory.announce(self._model, info, lifetime=RENEWALS_PER_LIFETIME * self._every_seconds)
            except SwarmError as failure:  # the network may be away for a while: the next renewal tries again
                level = logging.DEBUG if self._is_cut_off else logging.WARNING
                log.log(level, "the swarm could not be told that this server is %s: %s", info.state, failure)
                self._is_cut_off = True
            else:
                if self._is_cut_off:
                    log.warning("the swarm is told again that this server is %s", info.state)
                self._is_cut_off = False
