"""A server's record in the directory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Self

from shoal.concurrency import background
from shoal.errors import SwarmError
from shoal.net.addressing.reach_words import in_words
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.network.reachability import Reachability

log = logging.getLogger(__name__)

RENEWALS_PER_LIFETIME = 3
"""A record expires after as many intervals of renewal. So one renewal may fail, and a lost server soon disappears."""

GOODBYE_SECONDS = 3.0
"""The longest that `leave` waits for the directory. Peers that leave together may not answer, and records expire."""


class Announcer:
    """A server's record in the directory: renewed every `every_seconds` seconds, and marked as leaving at the end.

    A server that others cannot reach is announced as unreachable for that long: clients would wait for it in vain.
    """

    def __init__(self, node: Node, model: ModelInfo, info: ServerInfo, *, every_seconds: float) -> None:
        self._directory = node.directory
        self._transport = node.transport
        self._model = model
        self._describe: Callable[[], ServerInfo] = lambda: info
        self._every_seconds = every_seconds
        self._renewals: asyncio.Task[None] | None = None
        self._renew_now = asyncio.Event()
        self._announcing = asyncio.Lock()
        self._is_cut_off = False

    @contextlib.asynccontextmanager
    async def announcing(self) -> AsyncIterator[Self]:
        """Announce the server and renew its record until the context is left, or `leave` is called."""
        await self._announce(self.info)
        async with (
            background(self._watch_reach(), name="shoal-reach-watch"),
            background(self._renew(), name="shoal-announcer") as self._renewals,
        ):
            try:
                yield self
            finally:
                await self.leave()

    @property
    def info(self) -> ServerInfo:
        """What is announced at this moment."""
        info = self._describe()
        if info.state is ServerState.ONLINE and self._transport.reach.kind is Reachability.UNREACHABLE:
            return replace(info, state=ServerState.UNREACHABLE)
        return info

    def describe_by(self, describe: Callable[[], ServerInfo]) -> None:
        """Announce what `describe` returns, from the next time on."""
        self._describe = describe

    async def announce_now(self) -> bool:
        """Announce the server as it is now, unless it has left. Returns whether the directory took it.

        If the directory did not, the next renewal tries again.
        """
        return self._renewals is not None and await self._announce(self.info)

    def announce_soon(self) -> None:
        """Renew the record without waiting for the next interval."""
        self._renew_now.set()

    async def leave(self) -> None:
        """Announce that the server leaves, and stop renewing. May be called twice."""
        renewals, self._renewals = self._renewals, None
        if renewals is None:
            return
        renewals.cancel()
        await asyncio.wait([renewals])
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._announce(replace(self._describe(), state=ServerState.LEAVING))
        except TimeoutError:
            log.info("the directory did not confirm within %g s that this server leaves", GOODBYE_SECONDS)

    async def _renew(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_seconds):
                    await self._renew_now.wait()
            self._renew_now.clear()
            await self._announce(self.info)

    async def _watch_reach(self) -> None:
        """Announce it soon when others begin or cease to reach this server."""
        reach = self._transport.reach
        while True:
            before, reach = reach, await self._transport.reach_other_than(reach)
            if Reachability.UNREACHABLE in (before.kind, reach.kind):
                log.warning("%s", in_words(reach, self._transport.addresses))
            self.announce_soon()

    async def _announce(self, info: ServerInfo) -> bool:
        async with self._announcing:  # the directory refuses a record that is older than the one it has
            try:
                await self._directory.announce(self._model, info, lifetime=RENEWALS_PER_LIFETIME * self._every_seconds)
            except SwarmError as failure:  # the next renewal tries again
                level = logging.DEBUG if self._is_cut_off else logging.WARNING
                log.log(level, "the server could not announce that it is %s: %s", info.state, failure)
                self._is_cut_off = True
                return False
            else:
                if self._is_cut_off:
                    log.warning("the server can announce again that it is %s", info.state)
                self._is_cut_off = False
                return True
