"""Rings of servers that compute one pass: all are asked at once, and each pushes its outputs to the next one."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.client.swarm.broken_pairs import AwaitedPush
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.connection_pool import ConnectionPool
from shoal.client.training.late_starts import LateStarts
from shoal.client.training.pass_plan import MicrobatchPiece
from shoal.client.training.ring_turn import RingStart, RingTurn
from shoal.concurrency import owned_task
from shoal.model.peft.factors import AdapterFactors
from shoal.net.wire.codec import Tensors
from shoal.policy.contribution.credit import BACKWARD
from shoal.policy.routing.route import SLOWEST, Hop
from shoal.protocol import MAX_PUSHED_BYTES, MAX_STEP_TOKENS, Backward, Forward, NotCached, PassResult, Upstream
from shoal.spans import Span

Answered = tuple[Connection, PassResult | NotCached, Tensors]


@dataclass(frozen=True)
class RingPart:
    """What one server of a ring is asked for a piece. `tensors` are those that the client sends, not what is pushed."""

    hop: Hop
    request: Forward | Backward
    tensors: Tensors
    adapters: Sequence[AdapterFactors]
    piece: MicrobatchPiece

    @property
    def num_tokens(self) -> int:
        """The tokens of all sequences."""
        return self.piece.hidden.shape[:2].numel()


def _may_be_pushed(piece: MicrobatchPiece) -> bool:
    """Whether servers take inputs of this size from each other."""
    return piece.hidden.shape[:2].numel() <= MAX_STEP_TOKENS or piece.hidden.nbytes <= MAX_PUSHED_BYTES


@dataclass(frozen=True)
class AskedPart:
    """A part that a server was asked for. The `task` has its answer; None if it was not pushed its inputs."""

    part: RingPart
    turn: RingTurn
    task: asyncio.Task[Answered | None]

    @property
    def peer(self) -> str:
        """The server's peer id."""
        return self.part.hop.server.peer


class PassRings:
    """Asks the servers of rings over a `pool` of connections, which the owner opens and closes."""

    def __init__(self, swarm: Swarm) -> None:
        self.pool = ConnectionPool(swarm.connect, swarm.adapter_sync)
        self._starts = LateStarts(swarm)
        self._swarm = swarm

    def first_ring(self, pieces: Sequence[MicrobatchPiece]) -> Sequence[MicrobatchPiece]:
        """The first of these pieces, and those behind it as long as each server can push to the next one."""
        for index, (one, other) in enumerate(pairwise(pieces), start=1):
            assert one.hop is not None
            assert other.hop is not None
            if not (_may_be_pushed(one) and self._swarm.push_rules.allow(one.hop.server, other.hop.server)):
                return pieces[:index]
        return pieces

    @contextlib.asynccontextmanager
    async def asking(self, parts: Sequence[RingPart]) -> AsyncIterator[list[AskedPart]]:
        """Ask the servers for their parts.

        All are asked once each of them can be. Servers whose answers are not here when the context is left are told to
        wait no longer. Raises a `PeerError` if one cannot be asked, such as one that is late, where others are not.
        """
        start, links = RingStart(len(parts)), [secrets.token_hex(16) for _ in parts[1:]]
        pushes = [None, *(AwaitedPush(part.piece.hidden.nbytes) for part in parts[1:]), None]
        asked: list[AskedPart] = []
        try:
            for index, part in enumerate(parts):
                upstream = downstream = None
                if index:
                    upstream = Upstream(peer=parts[index - 1].hop.server.peer, link=links[index - 1])
                if index < len(links):
                    pair = part.hop.server, parts[index + 1].hop.server
                    downstream = self._swarm.push_rules.downstream_of(*pair, links[index])
                place = {"encoding": self._swarm.config.wire, "upstream": upstream, "downstream": downstream}
                request = part.request.model_copy(update=place)
                turn = RingTurn(start, pushes[index])
                task = asyncio.create_task(self._ask(part, request, turn, pushes[index + 1]))
                asked.append(AskedPart(part, turn, task))
            await self._started(start, asked)
            yield asked
        finally:
            for each in asked:
                each.task.cancel()
            await asyncio.gather(*(each.task for each in asked), return_exceptions=True)

    async def _started(self, start: RingStart, asked: Sequence[AskedPart]) -> None:
        """Wait until all servers can be asked. Raises the error of one that cannot."""
        async with contextlib.AsyncExitStack() as watching:
            watches = [
                await watching.enter_async_context(
                    owned_task(self._starts.watch(each.part.hop, each.turn, each.part.piece.hidden))
                )
                for each in asked
            ]
            await start.wait([*(each.task for each in asked), *watches])

    async def _ask(
        self, part: RingPart, request: Forward | Backward, turn: RingTurn, following: AwaitedPush | None
    ) -> Answered | None:
        server = part.hop.server
        usual = part.num_tokens / max(server.prefill_speed or 0.0, SLOWEST)
        answered = await self.pool.ask_in_ring(server, request, part.tensors, part.adapters, turn, usual_seconds=usual)
        if answered is None:
            return None
        connection, reply, tensors = answered
        self._swarm.record_answer(part.hop)
        assert isinstance(reply, PassResult | NotCached)
        if isinstance(reply, PassResult):
            if connection.tab is not None:
                times = BACKWARD if isinstance(request, Backward) else 1
                connection.tab.add(part.num_tokens, Span(request.start, request.end), times=times)
            if following is not None:
                following.is_due.set()
        return connection, reply, tensors
