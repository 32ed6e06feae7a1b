"""The swarm as a client sees it: who serves its model, and who of them may be used."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from shoal.client.options.client_options import ClientOptions
from shoal.concurrency import now
from shoal.errors import MissingBlocks, SwarmError
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.dtypes import mixture, swarm_dtype
from shoal.policy.view import SwarmView, format_blocks

log = logging.getLogger(__name__)


class DirectoryCache:
    """What the directory said last. `directory_error` is why it says nothing now, None if it does."""

    def __init__(self, node: Node, model: ModelInfo, fingerprint: str, config: ClientOptions) -> None:
        self.directory_error: SwarmError | None = None
        self._node = node
        self._model = model
        self._fingerprint = fingerprint
        self._config = config
        self._view: SwarmView | None = None
        self._viewed_at = float("-inf")
        self._mixture: str | None = None
        self._num_taken = self._num_used = 0
        self._refreshing = asyncio.Lock()

    def permit(self, config: ClientOptions) -> None:
        """The user permits other servers than before."""
        self._config = config

    async def ensure_fresh(self) -> None:
        """Take it anew if it is old. Raises `SwarmError` if the directory has never answered."""
        if now() - self._viewed_at > self._config.refresh_seconds:
            await self.refresh()

    def expire(self) -> None:
        """It is not true any more."""
        self._viewed_at = float("-inf")

    async def refresh(self) -> None:
        """Take it anew. If the directory does not answer, the last one has to do."""
        asked_at = now()
        async with self._refreshing:
            if self._viewed_at >= asked_at:  # by another task, in the meantime
                return
            try:
                servers = list(await self._node.directory.servers(self._model))
            except SwarmError as failure:
                if self._view is None:
                    raise
                log.warning("%s; going on with what was known", failure)
                self.directory_error = failure
                return
            random.shuffle(servers)  # among equals, different clients take different servers
            self._view = SwarmView(self._model.num_blocks, tuple(servers), self._config.pinned)
            self.directory_error = None
            self._say_mixture()
            self._num_taken += 1
            self._viewed_at = now()

    def is_new(self) -> bool:
        """Whether it has been taken since this was asked last."""
        used, self._num_used = self._num_used, self._num_taken
        return used != self._num_taken

    def _say_mixture(self) -> None:
        """Log who computes in what, if servers that may be used differ, and again when that has changed."""
        found = mixture(self._known().only(self._is_usable).servers)
        if found is not None and found != self._mixture:
            log.warning("servers of this model compute differently: %s", found)
        self._mixture = found

    def _known(self) -> SwarmView:
        return self._view or SwarmView(self._model.num_blocks, pinned=self._config.pinned)

    def _is_usable(self, server: ServerInfo) -> bool:
        allowed, blocked = self._config.allowed_servers, self._config.blocked_servers
        permitted = (allowed is None or server.peer in allowed) and server.peer not in blocked
        return permitted and server.fingerprint == self._fingerprint

    def dtype(self, *, own: str) -> str | None:
        """What the servers that may be used compute in, those that are still loading among them; None without any.

        `own` is the model's (`shoal.policy.dtypes`).
        """
        return swarm_dtype(self._known().only(self._is_usable), fingerprint=self._fingerprint, own=own)

    def known(self) -> SwarmView:
        """Those who say that they serve this model now."""
        return self._known().online()

    def usable(self) -> SwarmView:
        """Of these, those with our weights whom the user permits."""
        return self.known().only(self._is_usable)

    def missing(self, blocks: Sequence[int]) -> MissingBlocks:
        """Why none of the usable servers may compute these blocks."""
        names = format_blocks(blocks)
        for span, peer in self._config.pinned:
            if any(block in span for block in blocks):
                held = [str(server.span) for server in self.usable().servers if server.peer == peer]
                but = f"holds {held[0]}" if held else "does not serve this model"
                return MissingBlocks(
                    f"blocks {span} are pinned to {peer}, which {but}",
                    blocks=blocks,
                    hint="pin blocks that it holds (shoal status --json tells), or let others serve them",
                )
        holders = [server for server in self.known().servers if any(block in server.span for block in blocks)]
        if any(server.fingerprint == self._fingerprint for server in holders):
            return MissingBlocks(f"blocks {names} are served only by servers that you do not allow", blocks=blocks)
        if holders:
            others = ", ".join(sorted({server.fingerprint[:12] for server in holders}))
            return MissingBlocks(
                f"blocks {names} are served only with other weights ({others}) than yours ({self._fingerprint[:12]})",
                blocks=blocks,
                hint="use the revision of the model that the servers use, or serve yours",
            )
        return MissingBlocks(
            f"no server holds blocks {names} of {self._model.name}",
            blocks=blocks,
            hint=f"start one: shoal serve MODEL --blocks {names.split(', ')[0]} --initial-peers ADDRESS",
        )
