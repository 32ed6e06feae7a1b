"""A generation in progress: what the servers cache, and what the client keeps so that any of them can be replaced."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch

from shoal.client.chain import Chain, Holding, named_tensors
from shoal.client.connection import CannotRewind, Connection
from shoal.client.history import History
from shoal.client.logits import Logits, Question
from shoal.errors import PeerError, ServerBusy, ServerLost, UserError
from shoal.model.prefix import DIGEST_BYTES, PAGE_TOKENS, page_names, root
from shoal.net.encodings import as_received
from shoal.protocol import MAX_STEP_TOKENS, Open, Ping, Pong, Step, TensorName
from shoal.routing.route import Hop
from shoal.spans import Span

KEEPALIVE_SECONDS = 60.0
"""A server forgets a client that says nothing for some minutes; a user may think for longer."""


class _Share:
    """A session's part on one server.

    `history` is what its blocks were given, `num_computed_tokens` how much of that the server holds. A step brings the
    second up to the first: decoding, a long prefill and the replay after a failure are all that one subtraction.
    """

    def __init__(self, hop: Hop, history: History) -> None:
        self.hop = hop
        self.history = history
        self.num_computed_tokens = 0
        self.pending_rows: tuple[int, ...] | None = None  # a rearrangement that the server has not been told
        self.connection: Connection | None = None

    def take(self, inputs_BTD: torch.Tensor, start: int) -> None:
        """Add the inputs of the tokens from `start` on, except for those that are known already."""
        new_BTD = inputs_BTD[:, self.history.num_tokens - start :]
        if new_BTD.shape[1]:
            self.history.append(new_BTD)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.history.select_rows(rows)
        if self.num_computed_tokens:
            pending = self.pending_rows
            self.pending_rows = tuple(rows) if pending is None else tuple(pending[row] for row in rows)

    def crop(self, num_tokens: int) -> None:
        self.history.crop(num_tokens)
        self.num_computed_tokens = min(self.num_computed_tokens, num_tokens)
        if self.num_computed_tokens == 0:
            self.pending_rows = None

    async def disconnect(self, *, goodbye: bool = True) -> None:
        """Give up the server's state; the history stays."""
        connection, self.connection = self.connection, None
        self.num_computed_tokens = 0
        self.pending_rows = None
        if connection is not None:
            await connection.close(goodbye=goodbye)


class Session:
    """The decoding state of a batch of sequences across a route. Runs on the client's event loop."""

    def __init__(self, chain: Chain, span: Span, *, batch_size: int, max_length: int) -> None:
        self.span = span
        self.batch_size = batch_size
        self.max_length = max_length
        self._chain = chain
        self._shares: list[_Share] = []
        self._masks: History | None = None  # None while no sequence is padded
        self._positions: History | None = None  # None while they just count
        self._busy = asyncio.Lock()
        self._keepalive: asyncio.Task[None] | None = None
        self._step: asyncio.Task[Any] | None = None  # the one that runs
        self._closed = False

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Where it runs at present."""
        return tuple(share.hop for share in self._shares)

    def crop(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` tokens."""
        for log in (*self._shares, self._masks, self._positions):
            if log is not None:
                log.crop(num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        self.batch_size = len(rows)
        for log in (*self._shares, self._masks, self._positions):
            if log is not None:
                log.select_rows(rows)

    async def step(
        self,
        hidden_BTD: torch.Tensor,
        position: int,
        positions_BT: torch.Tensor | None,
        mask_BT: torch.Tensor | None,
        question: Question | None = None,
    ) -> torch.Tensor | Logits:
        """Append the inputs of the tokens from `position` on; returns the span's outputs for them, [B, T, D].

        With a `question` to the output head, its answer instead, if the last server has a head. If it fails or is
        cancelled, the session is as if it had never been called.
        """
        async with self._busy:
            if self._closed:
                raise UserError("this session is closed")
            self._keepalive = self._keepalive or asyncio.create_task(self._keep_alive())
            self.crop(position)  # what an interrupted step may have left
            self._positions = _logged(
                self._positions, positions_BT, position, lambda start, end: torch.arange(start, end), hidden_BTD
            )
            if mask_BT is not None and mask_BT.all():
                mask_BT = None
            self._masks = _logged(
                self._masks,
                mask_BT,
                position,
                lambda start, end: torch.ones(end - start, dtype=torch.uint8),
                hidden_BTD,
            )
            self._step = asyncio.current_task()
            try:
                return await self._walk(hidden_BTD, position, question)
            finally:
                self._step = None

    async def _walk(self, hidden_BTD: torch.Tensor, position: int, question: Question | None) -> torch.Tensor | Logits:
        index, inputs, start = 0, as_received(hidden_BTD, self._chain.config.wire), position
        failed = False

        async def walk(excluded: Set[Holding]) -> torch.Tensor | Logits:
            nonlocal index, inputs, start, failed
            if not self._shares:
                self._shares = [_Share(hop, History()) for hop in await self._route(self.span, excluded)]
            if failed:
                self._shares[index : index + 1] = await self._replace(self._shares[index], excluded)
                failed = False
            while index < len(self._shares):
                share = self._shares[index]
                share.take(inputs, start)
                answers = share.hop.server.head and index == len(self._shares) - 1
                try:
                    outcome, since = await self._catch_up(share, question if answers else None)
                except ServerBusy:
                    failed = True
                    # Whoever waits for room holds none: two who wait for each other's would wait for ever.
                    await self._disconnect()
                    raise
                except PeerError:
                    failed = True
                    raise
                index += 1
                if isinstance(outcome, Logits):
                    return outcome
                inputs, start = outcome, since
            return inputs[:, position - start :]

        return await self._chain.persist(self.span, walk)

    async def _replace(self, share: _Share, excluded: Set[Holding]) -> list[_Share]:
        """Servers for the blocks of one that failed. The first replays its history, the others get what comes out."""
        first, *others = await self._route(share.hop.span, excluded)
        return [_Share(first, share.history), *(_Share(hop, History()) for hop in others)]

    async def _route(self, span: Span, excluded: Set[Holding]) -> tuple[Hop, ...]:
        head = self._chain.config.remote_head and span.end == self._chain.model.num_blocks
        return await self._chain.route(span, excluded, head=head)

    async def _catch_up(self, share: _Share, question: Question | None = None) -> tuple[torch.Tensor | Logits, int]:
        """Let a server compute what it has not; returns those outputs and the position at which they start.

        With a question, the answer to that.
        """
        if share.connection is None:
            share.num_computed_tokens, share.pending_rows = 0, None
        start = share.num_computed_tokens
        outputs: list[torch.Tensor] = []
        logits: list[Logits] = []
        try:
            if share.connection is None:
                known = await self._open(share, question)
                if known is not None:
                    outputs.append(known)
                    share.num_computed_tokens = known.shape[1]
            tokens_at_once = max(1, MAX_STEP_TOKENS // self.batch_size)
            for piece in share.history.pieces(share.num_computed_tokens, tokens_at_once):
                if question is None:
                    outputs.append(await self._send(share, piece))
                elif (answer := await self._ask_head(share, piece, question)) is not None:
                    logits.append(answer)
                share.pending_rows = None
                share.num_computed_tokens += piece.shape[1]
        except CannotRewind as refusal:
            await share.disconnect()
            if start == 0:
                raise ServerLost(f"{refusal.peer} cannot go on with what it was just sent", peer=refusal.peer) from None
            return await self._catch_up(share, question)
        except BaseException:
            await share.disconnect(goodbye=False)
            raise
        self._chain.answered(share.hop.server.peer)
        if question is not None:
            return Logits.joined(logits), start
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], start

    async def _open(self, share: _Share, question: Question | None) -> torch.Tensor | None:
        """Connect; returns the outputs [B, T, D] of first tokens that the server has computed before, for anybody."""
        hop = share.hop
        share.connection = await self._chain.connect(hop.server)
        request = Open(
            model=self._chain.model.key,
            fingerprint=self._chain.fingerprint,
            start=hop.span.start,
            end=hop.span.end,
            batch_size=self.batch_size,
            max_length=self.max_length,
            salt=self._chain.config.salt,
        )
        inputs_BTD = share.history.since(0)
        # Of tokens that need no computing, a server knows no logits: what a question is about has no name.
        named_BTD = inputs_BTD if question is None else inputs_BTD[:, : -question.num_tokens]
        return await share.connection.begin(request, self._digests(hop.span, named_BTD), inputs_BTD)

    def _digests(self, span: Span, inputs_BTD: torch.Tensor) -> torch.Tensor | None:
        """The names [B, pages, 16] of inputs with which sequences begin. Padded ones have none."""
        num_tokens = inputs_BTD.shape[1]
        if num_tokens < PAGE_TOKENS or self._masks is not None:
            return None
        positions_BT = torch.arange(num_tokens).expand(self.batch_size, -1)
        if self._positions is not None:
            positions_BT = self._positions.since(0)[:, :num_tokens]
        first = root(span, self._chain.config.salt)
        names = [
            b"".join(page_names(first, hidden, positions))
            for hidden, positions in zip(inputs_BTD, positions_BT, strict=True)
        ]
        digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        return digests.view(self.batch_size, -1, DIGEST_BYTES)

    async def _ask_head(self, share: _Share, piece_BTD: torch.Tensor, question: Question) -> Logits | None:
        assert share.connection is not None
        start = share.num_computed_tokens
        num_wanted = question.within(start + piece_BTD.shape[1], start=start, num_tokens=share.history.num_tokens)
        request = Step(position=start, rows=share.pending_rows, logits=num_wanted, top_k=question.top_k)
        return await share.connection.logits(request, self._tensors(start, piece_BTD), question)

    def _tensors(self, start: int, piece_BTD: torch.Tensor) -> dict[TensorName, torch.Tensor]:
        num_tokens = piece_BTD.shape[1]
        return named_tensors(
            piece_BTD,
            None if self._positions is None else self._positions.since(start)[:, :num_tokens],
            None if self._masks is None else self._masks.since(start)[:, :num_tokens],
        )

    async def _send(self, share: _Share, piece_BTD: torch.Tensor) -> torch.Tensor:
        assert share.connection is not None
        start, tensors = share.num_computed_tokens, self._tensors(share.num_computed_tokens, piece_BTD)
        request = Step(position=start, rows=share.pending_rows)
        return await share.connection.compute(request, tensors, answer="hidden", shape=piece_BTD.shape)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_SECONDS)
            async with self._busy:
                for share in self._shares:
                    if share.connection is not None:
                        try:
                            await share.connection.ask(Ping(), expect=Pong)
                        except PeerError:
                            await share.disconnect(goodbye=False)  # the next step connects again, or reroutes

    async def _disconnect(self) -> None:
        for share in self._shares:
            await share.disconnect()

    async def close(self) -> None:
        """Let the servers forget it. May be called twice."""
        self._closed = True
        for task in (self._keepalive, self._step):
            if task is not None:
                task.cancel()
        async with self._busy:
            await self._disconnect()


def _logged(
    log: History | None,
    piece_BT: torch.Tensor | None,
    position: int,
    default: Callable[[int, int], torch.Tensor],
    hidden_BTD: torch.Tensor,
) -> History | None:
    """A log of something that every token has, kept from the first time that it is not what it is by default."""
    if log is None and piece_BT is None:
        return None
    batch_size, num_tokens, _ = hidden_BTD.shape
    if log is None:
        log = History()
        if position:
            log.append(default(0, position).expand(batch_size, -1))
    if piece_BT is None:
        piece_BT = default(position, position + num_tokens).expand(batch_size, -1)
    log.append(piece_BT)
    return log
