"""What is computed for the client of one stream: for whom it counts, and what the client acknowledges of it."""

from __future__ import annotations

from shoal.net.transport import Stream
from shoal.protocol import Acknowledge, Introduce
from shoal.server.engine.engine import Engine
from shoal.server.refusals import rejected
from shoal.server.rpc.ping_pace import payer_behind
from shoal.spans import Span


class StreamAccount:
    """The account of a stream, from its beginning until `leave`."""

    def __init__(self, stream: Stream, engine: Engine) -> None:
        self._engine = engine
        self._client = stream.peer
        self._payer = payer_behind(stream)
        self._accounts: tuple[str, ...] | None = None  # that the client acts for, once it has said that
        self._unacknowledged = 0.0

    async def introduce(self, said: Introduce) -> None:
        """The client says which servers it acts for. Raises `Refused` if it has said so before."""
        if self._accounts is not None:
            raise rejected("a client introduces itself once")
        self._accounts = ()
        self._accounts = await self._engine.priorities.introduce(self._client, self._payer, said)

    def computed(self, num_tokens: int, span: Span, *, times: int = 1) -> None:
        """Tokens were computed through the blocks of a span, or what costs `times` as much."""
        priorities = self._engine.priorities
        if priorities.is_on:
            work = times * priorities.work(num_tokens, span)
            priorities.served(self._payer, work)
            self._unacknowledged += work

    async def acknowledged(self, said: Acknowledge) -> None:
        """The client acknowledges what was computed for it. What it has not signed is ignored."""
        work, self._unacknowledged = self._unacknowledged, 0.0
        await self._engine.priorities.acknowledged(said.acknowledgement, work)

    def leave(self) -> None:
        """The stream has ended."""
        if self._accounts:
            self._engine.priorities.leave(self._payer, self._accounts)
