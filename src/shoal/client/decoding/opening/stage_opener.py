"""Connects to the servers of a session, and opens the session on each of them."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable

import torch

from shoal.client.decoding.outputs import Sink
from shoal.client.decoding.progress import StageStatus
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Neighbors, Stage
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.swarm import Swarm
from shoal.concurrency import now
from shoal.errors import PeerError, ServerLost
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.routing.route import Hop
from shoal.protocol import Open

OPEN_SECONDS = 3.0
"""How long a server may take to accept a stream, and then to open a session, if others hold its blocks. Usually each
takes a round trip."""
LONGEST_OPEN_SECONDS = 10.0
"""A server that has not opened a session after this time is lost, if it is the only one or sends what it has cached."""


class StageOpener:
    """Opens one session, with these inputs and adapters, on servers. A stage whose server fails keeps the error.

    `expected_length` says for how many tokens a server needs room.
    """

    def __init__(
        self, swarm: Swarm, inputs: SessionInputs, tuning: ActiveAdapters, *, expected_length: Callable[[], int]
    ) -> None:
        self._swarm = swarm
        self._inputs = inputs
        self._tuning = tuning
        self._expected_length = expected_length

    async def connect(self, stage: Stage) -> None:
        """Connect to a server, and send it the adapters that it lacks."""
        await stage.disconnect()  # an earlier attempt may have been interrupted
        try:
            connection = await self._connection(stage.hop)
            try:
                adapters = self._tuning.in_span(stage.hop.span)
                await self._swarm.adapter_sync.ensure_loaded(connection, stage.hop.server, adapters, session=True)
            except BaseException:
                await connection.close()
                raise
            stage.adopt(connection)
        except PeerError as error:
            stage.fail(error)

    async def _connection(self, hop: Hop) -> Connection:
        """A new connection to the server of a hop. Raises `ServerLost`."""
        peer = hop.server.peer
        try:
            async with asyncio.timeout(OPEN_SECONDS if self._swarm.servers.has_others(hop) else None):
                return await self._swarm.connect(hop.server)
        except TimeoutError:
            raise ServerLost(f"{peer} did not answer within {OPEN_SECONDS:g} s", peer=peer) from None

    async def send_open(self, stage: Stage, digests: torch.Tensor | None, *, skip: int, neighbors: Neighbors) -> None:
        """Ask a server to open the session. `digests` [B, pages, 16] name its first tokens, of which it may have some
        in its cache; the outputs of the first `skip` tokens are known."""
        upstream, downstream = neighbors
        request = Open(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=stage.hop.span.start,
            end=stage.hop.span.end,
            adapters=self._tuning.names(stage.hop.span),
            batch_size=self._inputs.like.shape[0],
            expected_length=self._expected_length(),
            salt=self._inputs.salt,
            skip=skip,
            epoch=self._inputs.epoch.number,
            receipts=secrets.token_hex(16) if self._swarm.audits.is_on else None,
            upstream=upstream,
            downstream=downstream,
        )
        with contextlib.suppress(PeerError):  # the stage keeps the error
            await stage.open(request, digests)

    async def await_opened(
        self, stage: Stage, sink: Sink, is_possible: Callable[[int], bool] = lambda num_cached: True
    ) -> None:
        """Wait until the server has opened the session or has failed. One that lacks adapters is left closed.

        The outputs of the tokens that it had in its cache go to `sink`. If it is not possible that it had so many of
        them, what it was asked was wrong, and it is left closed too.
        """
        connection = stage.connection
        if connection is None:
            return
        wire, late_at = self._swarm.config.wire, now() + OPEN_SECONDS
        try:
            async with asyncio.timeout(LONGEST_OPEN_SECONDS):
                while not (
                    stage.connection is not connection  # somebody else has closed it
                    or stage.has_failed
                    or stage.not_cached is not None
                    or not is_possible(stage.num_said_cached)
                    or stage.settle_opening(sink, like=self._inputs.like, wire=wire)
                ):
                    await stage.has_news.wait()
                    stage.has_news.clear()
                    # Something came, such as a pong, and not in the midst of a large answer: none is on its way.
                    if (
                        now() > late_at
                        and stage.status is StageStatus.OPENING
                        and self._swarm.servers.has_others(stage.hop)
                    ):
                        raise TimeoutError
        except TimeoutError:
            connection.fail(connection.lost("does not open a session"))
        if stage.status is StageStatus.OPENING and not is_possible(stage.num_said_cached):
            await stage.reset()
        if (not_cached := stage.not_cached) is not None:
            self._swarm.adapter_sync.forget(stage.peer, self._tuning.in_span(stage.hop.span), not_cached.adapters)
            await stage.reset()  # the next attempt uploads the adapters first
