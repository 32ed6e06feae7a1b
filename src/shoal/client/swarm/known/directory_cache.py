"""The directory as a client read it last: which servers hold blocks of its model, and which of them it may use."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.waits import Outage
from shoal.concurrency import now
from shoal.errors import MissingBlocks, SwarmError
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.census.sampling import MOST_KEPT, keep
from shoal.policy.dtypes import mixture, swarm_dtype
from shoal.policy.view import SwarmView, format_blocks
from shoal.policy.waiting import loaders, outlook, seconds_to_look, seconds_to_ready
from shoal.protocol import PROTOCOL_VERSION, UPGRADE, speaks_other
from shoal.spans import Span

log = logging.getLogger(__name__)


Holding = tuple[str, Span, bool]
"""A peer with the blocks that it announces, and whether it offers the head: with others, it is another server."""


def holding(server: ServerInfo) -> Holding:
    """What a server announces to hold."""
    return server.peer, server.span, server.head


class DirectoryCache:
    """The servers that the directory named last. Of a large swarm, a sample is kept (`shoal.policy.census.sampling`).

    `round_trips` returns the seconds to the servers that the client has measured, by peer id. `version` grows with
    every answer of the directory. `error` is why its last answer failed; None if it did not.
    """

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        fingerprint: str,
        config: ClientOptions,
        round_trips: Callable[[], Mapping[str, float]] = dict,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.error: SwarmError | None = None
        self.version = 0
        self._node = node
        self._model = model
        self._fingerprint = fingerprint
        self._config = config
        self._round_trips = round_trips
        self._rng = random.Random(random.getrandbits(32))  # noqa: S311 - nothing secret; tests seed the module
        self._view: SwarmView | None = None
        self._read_at = float("-inf")
        self._unix_time = unix_time
        self._searched: frozenset[int] = frozenset()  # the blocks whose holders were searched for then
        self._mixture: str | None = None
        self._announced: set[int] = set()  # blocks that usable servers hold, load, or have held or loaded
        self._refreshing = asyncio.Lock()

    def permit(self, config: ClientOptions) -> None:
        """Use other servers than before, as a changed config says."""
        self._config = config
        self._announced = set()
        self._note_announced()

    async def ensure_fresh(self) -> None:
        """Read the directory if the cache is old. Raises `SwarmError` if the directory has never answered."""
        if now() - self._read_at > self._config.refresh_seconds:
            await self.refresh()

    def expire(self) -> None:
        """The cache is wrong: read the directory before the next use."""
        self._read_at = float("-inf")

    async def refresh(self, blocks: Collection[int] = ()) -> None:
        """Read the directory. If it does not answer, the last answer stays.

        In a large swarm, more holders of `blocks` are searched for.

        Raises `SwarmError` if the directory has never answered.
        """
        asked_at = now()
        async with self._refreshing:
            if self._read_at >= asked_at and self._searched.issuperset(blocks):  # another task has read it meanwhile
                return
            try:
                servers = await self._node.directory.servers(self._model, blocks=blocks)
            except SwarmError as failure:
                if self._view is None:
                    raise
                log.warning("%s; using what the directory said last", failure)
                self.error = failure
                return
            kept = self._kept(servers)
            random.shuffle(kept)  # of equal servers, different clients use different ones
            self._view = SwarmView(self._model.num_blocks, tuple(kept), self._config.pinned)
            self.error = None
            self._note_announced()
            self._log_mixture()
            self.version += 1
            self._read_at, self._searched = now(), frozenset(blocks)

    def _kept(self, servers: Sequence[ServerInfo]) -> list[ServerInfo]:
        """All servers of a small swarm; of a large one, a sample of those that may be used, if there are any."""
        if len(servers) > MOST_KEPT:
            servers = [server for server in servers if self.is_usable(server)] or servers
        return keep(servers, self._round_trips(), num_blocks=self._model.num_blocks, rng=self._rng)

    def _note_announced(self) -> None:
        lacking = self._known().only(self.is_usable).missing()
        self._announced.update({*range(self._model.num_blocks)}.difference(lacking))

    def _log_mixture(self) -> None:
        """Log which servers compute in which dtype, if those that may be used differ, and again when that changes."""
        found = mixture(self._known().only(self.is_usable).servers)
        if found is not None and found != self._mixture:
            log.warning("servers of this model compute differently: %s", found)
        self._mixture = found

    def _known(self) -> SwarmView:
        return self._view or SwarmView(self._model.num_blocks, pinned=self._config.pinned)

    def is_usable(self, server: ServerInfo) -> bool:
        """Whether a server has this client's weights and speaks its protocol, and the user permits it."""
        allowed, blocked = self._config.allowed_servers, self._config.blocked_servers
        permitted = (allowed is None or server.peer in allowed) and server.peer not in blocked
        return permitted and self._fits(server)

    def _fits(self, server: ServerInfo) -> bool:
        return server.fingerprint == self._fingerprint and server.protocol == PROTOCOL_VERSION

    def dtype(self, *, own: str) -> str | None:
        """The dtype of the servers that may be used, those that are loading included; None if there is none.

        `own` is the model's dtype (`shoal.policy.dtypes`).
        """
        return swarm_dtype(self._known().only(self.is_usable), fingerprint=self._fingerprint, own=own)

    def loading(self) -> SwarmView:
        """The servers with this client's weights that the user permits, and that are loading blocks: these blocks."""
        return self._known().loading().only(self.is_usable)

    def everybody(self) -> SwarmView:
        """All servers of this model: those that load blocks or are about to leave, too."""
        return self._known()

    def known(self) -> SwarmView:
        """The servers of this model that are online."""
        return self._known().online()

    def _unreachable(self) -> Sequence[ServerInfo]:
        """The servers with this client's weights that others cannot reach."""
        view = self._known().only(lambda server: server.state is ServerState.UNREACHABLE)
        return view.only(self._fits).servers

    def usable(self) -> SwarmView:
        """Of these, the servers with this client's weights that the user permits."""
        return self.known().only(self.is_usable)

    def holdings(self, peer: str) -> set[Holding]:
        """What a peer announces to hold."""
        return {holding(server) for server in self.known().servers if server.peer == peer}

    def outage(self, blocks: Sequence[int]) -> Outage:
        """Why blocks without a usable server are worth waiting for. Raises `MissingBlocks` if some of them are not.

        A client waits for blocks that usable servers have announced while it knew the swarm, to hold them or to load
        them. It does not wait if another server holds them now that the user's own choice of servers excludes.
        """
        loading, unix_time = self.loading(), self._unix_time()
        mine = replace(self.known(), pinned=()).only(self._fits)
        excluded = {block for server in mine.servers for block in server.span}
        excluded.intersection_update(loading.missing())
        if in_vain := [block for block in blocks if block in excluded or block not in self._announced]:
            raise self.missing(in_vain) from None
        ready_in = seconds_to_ready(loading, blocks, now=unix_time)
        return Outage(
            tuple(blocks),
            self.missing(blocks),
            outlook(loading, blocks, now=unix_time),
            look_seconds=seconds_to_look(ready_in),
            ready_in=ready_in,
            loaders=loaders(loading, blocks),
        )

    def missing(self, blocks: Sequence[int]) -> MissingBlocks:
        """An error that says why no usable server may compute these blocks."""
        names = format_blocks(blocks)
        for span, peer in self._config.pinned:
            if any(block in span for block in blocks):
                held = [str(server.span) for server in self.usable().servers if server.peer == peer]
                but = f"holds {held[0]}" if held else "does not serve this model"
                return MissingBlocks(
                    f"blocks {span} are pinned to {peer}, which {but}",
                    blocks=blocks,
                    hint="pin blocks that it holds (see shoal status --json), or pin them to no peer",
                )
        holders = [server for server in self.known().servers if any(block in server.span for block in blocks)]
        if any(map(self._fits, holders)):
            return MissingBlocks(f"blocks {names} are served only by servers that you do not allow", blocks=blocks)
        if strangers := [server for server in holders if server.fingerprint == self._fingerprint]:
            server = strangers[0]
            return MissingBlocks(
                f"blocks {names} have no server that this client can talk to: {server.name or server.peer} "
                f"(shoal {server.version}) {speaks_other(server.protocol)}",
                blocks=blocks,
                hint=UPGRADE,
            )
        if holders:
            others = ", ".join(sorted({server.fingerprint[:12] for server in holders}))
            return MissingBlocks(
                f"blocks {names} are served only with other weights ({others}) than yours ({self._fingerprint[:12]})",
                blocks=blocks,
                hint="use the revision of the model that the servers use, or serve your own",
            )
        if cut_off := [server for server in self._unreachable() if any(block in server.span for block in blocks)]:
            server = cut_off[0]
            return MissingBlocks(
                f"blocks {names} are held by {server.name or server.peer}, which other machines cannot reach",
                blocks=blocks,
                hint="its log says what to do; so does `shoal doctor` there",
            )
        return MissingBlocks(
            f"no server holds blocks {names} of {self._model.name}",
            blocks=blocks,
            hint=f"start one: shoal serve MODEL --blocks {names.split(', ')[0]} --initial-peers ADDRESS",
        )
