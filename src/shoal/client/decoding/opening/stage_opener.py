"""Connects to the servers of a session, and opens the session on each of them."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable

import torch

from shoal.client.decoding.outputs import Sink
from shoal.client.decoding.progress import StageStatus
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Neighbors, Stage
from shoal.client.swarm.swarm import Swarm
from shoal.client.swarm.trials import wait_for_others
from shoal.concurrency import now, owned_task
from shoal.errors import PeerError, ServerLate
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.lateness import opening_late_after
from shoal.policy.routing.route import Hop
from shoal.protocol import Open

log = logging.getLogger(__name__)

LONGEST_OPEN_SECONDS = 10.0
"""A server that has not opened a session after this time is lost, if no others are ready or it sends what it has
cached."""


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
            async with contextlib.AsyncExitStack() as unless_adopted:
                async with asyncio.timeout(None) as limit, self._racing(stage.hop, lambda: limit.reschedule(now())):
                    connection = await self._swarm.connect(stage.hop.server)
                    unless_adopted.push_async_callback(connection.close)
                adapters = self._tuning.in_span(stage.hop.span)
                await self._swarm.adapter_sync.ensure_loaded(connection, stage.hop.server, adapters, session=True)
                stage.adopt(connection)
                unless_adopted.pop_all()
        except TimeoutError:
            stage.fail(_late(stage.hop, "accepted no connection"))
        except PeerError as error:
            stage.fail(error)

    @contextlib.asynccontextmanager
    async def _racing(self, hop: Hop, others_are_ready: Callable[[], object]) -> AsyncIterator[None]:
        """While this is open, other servers are tried when the server of a hop is late with what it should open."""

        async def race() -> None:
            round_trip = self._swarm.measurements.round_trips().get(hop.server.peer)
            await asyncio.sleep(opening_late_after(round_trip))
            log.info("%s is late: trying other servers", hop.server.peer)
            await wait_for_others(self._swarm, hop.server, hop.span, self._inputs.like)
            others_are_ready()

        async with owned_task(race()):
            yield

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
        wire, others_are_ready = self._swarm.config.wire, asyncio.Event()

        def give_up() -> None:
            others_are_ready.set()
            if not stage.offers_cached:
                stage.has_news.set()

        try:
            async with asyncio.timeout(LONGEST_OPEN_SECONDS), self._racing(stage.hop, give_up):
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
                    if others_are_ready.is_set() and stage.status is StageStatus.OPENING:
                        connection.fail(_late(stage.hop, "opened no session"))
        except TimeoutError:
            connection.fail(connection.lost("does not open a session"))
        if stage.status is StageStatus.OPENING and not is_possible(stage.num_said_cached):
            await stage.reset()
        if (not_cached := stage.not_cached) is not None:
            self._swarm.adapter_sync.forget(stage.peer, self._tuning.in_span(stage.hop.span), not_cached.adapters)
            await stage.reset()  # the next attempt uploads the adapters first


def _late(hop: Hop, what: str) -> ServerLate:
    return ServerLate(f"{hop.server.peer} {what} while others computed", peer=hop.server.peer)
