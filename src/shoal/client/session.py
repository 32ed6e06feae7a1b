"""A generation in progress: what the servers cache, and what the client keeps so that any of them can be replaced.

A step goes around a ring: to the first server, from each straight to the next, and from the last one back. Each also
sends its outputs to us, off the critical path: they are the inputs of the next, from which that could be rebuilt
anywhere. So there is nothing special about a failure. Every server is asked for whatever of its inputs it has not been
asked for yet, by the server before it where that can push, by us where it cannot; a replacement simply lacks all.
"""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence, Set
from itertools import pairwise
from typing import Any

import torch

from shoal.client.chain import Chain, Holding, named_tensors
from shoal.client.connection import CannotRewind
from shoal.client.history import History
from shoal.client.logits import Logits, Question
from shoal.client.ring import Ring
from shoal.client.share import STEPS_AHEAD, Outputs, Request, Share, Sink
from shoal.client.store import Store
from shoal.errors import PeerError, ServerBusy, ServerLost, UserError
from shoal.model.prefix import DIGEST_BYTES, PAGE_TOKENS, page_names, root
from shoal.net.encodings import as_received
from shoal.protocol import MAX_STEP_TOKENS, Open, TensorName
from shoal.routing.route import SLOWEST, Hop
from shoal.spans import Span

log = logging.getLogger(__name__)

RING_TOKENS = 256
"""A long prompt goes through the ring in pieces of so many tokens: the servers work on several of them at once."""
OPENED_SECONDS = 10.0

Change = int | tuple[int, ...]
"""What is to be done before the next step: forget everything after so many tokens, or rearrange the batch."""


class Session:
    """The decoding state of a batch of sequences across a route. Runs on the client's event loop."""

    def __init__(self, chain: Chain, span: Span, *, batch_size: int, max_length: int) -> None:
        self.span = span
        self.batch_size = batch_size
        self.max_length = max_length
        self._chain = chain
        self._inputs = History(chain.store)
        self._shares: list[Share] = []
        self._ring = Ring(chain.broken_pairs, wire=chain.config.wire)
        self._epoch = 0
        self._changes: list[Change] = []
        self._outputs = Outputs(0)
        self._question: Question | None = None
        self._masks: History | None = None  # None while no sequence is padded
        self._positions: History | None = None  # None while they just count
        self._news = asyncio.Event()
        self._clock = time.monotonic
        self._busy = asyncio.Lock()
        self._step: asyncio.Task[Any] | None = None  # the one that runs
        self._closed = False

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Where it runs at present."""
        return tuple(share.hop for share in self._shares)

    def crop(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` tokens."""
        self._changes.append(num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        self.batch_size = len(rows)
        self._changes.append(tuple(rows))

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
            self._step = asyncio.current_task()
            try:
                self._changes.append(position)  # what an interrupted step may have left
                await self._make_changes()
                self._log(hidden_BTD, position, positions_BT, mask_BT)
                self._outputs, self._question = Outputs(position), question
                self._inputs.append(as_received(hidden_BTD, self._chain.config.wire))
                await self._reach(self._is_answered)
                return self._outputs.joined()
            finally:
                self._step = None

    def _log(
        self,
        hidden_BTD: torch.Tensor,
        position: int,
        positions_BT: torch.Tensor | None,
        mask_BT: torch.Tensor | None,
    ) -> None:
        if mask_BT is not None and mask_BT.all():
            mask_BT = None
        self._positions = _logged(
            self._positions, positions_BT, position, lambda start, end: torch.arange(start, end), hidden_BTD
        )
        self._masks = _logged(
            self._masks, mask_BT, position, lambda start, end: torch.ones(end - start, dtype=torch.uint8), hidden_BTD
        )

    # -- going back, and rearranging ----------------------------------------------------------------------------------

    async def _make_changes(self) -> None:
        """Do what was asked for since the last step, once the inputs of all servers are known up to there."""
        while self._changes:
            change = self._changes[0]
            if isinstance(change, tuple):
                await self._reach(self._is_settled)
                histories = (self._inputs, *(share.history for share in self._shares[1:]))
                for each in (*histories, self._masks, self._positions):
                    if each is not None:
                        each.select_rows(change)
                for share in self._shares:
                    share.rearranged(change)
                self._epoch += 1
            elif self._is_beyond(change):
                self._inputs.crop(change)
                await self._reach(self._is_settled)
                for each in (self._masks, self._positions):
                    if each is not None:
                        each.crop(change)
                for share in self._shares:
                    share.crop(change)
                self._epoch += 1
            self._changes.pop(0)

    def _is_beyond(self, num_tokens: int) -> bool:
        """Whether anything is known or asked beyond so many tokens."""
        ends = [self._inputs.num_tokens, *(max(share.num_tokens, share.num_requested) for share in self._shares)]
        return max(ends) > num_tokens

    def _is_settled(self) -> bool:
        """Whether all inputs are known that any server was given: then nothing depends on what is on its way."""
        return all(share.num_tokens >= self._inputs.num_tokens for share in self._shares)

    def _is_answered(self) -> bool:
        """Whether the outputs, or the answer to the question, are here."""
        return bool(self._shares) and self._shares[-1].num_computed >= self._inputs.num_tokens

    # -- the one procedure --------------------------------------------------------------------------------------------

    async def _reach(self, is_done: Callable[[], bool]) -> None:
        """Let the servers compute what they have not, until this is so, replacing those that fail."""

        async def act(excluded: Set[Holding]) -> None:
            while not is_done():
                await self._check()
                await self._mend(excluded)
                await self._pump(is_done)

        if not is_done():
            await self._chain.persist(self.span, act)

    async def _pump(self, is_done: Callable[[], bool]) -> None:
        """Ask, and look at what comes. Returns when it is done, or a session has to be opened again."""
        limit = self._chain.config.longest_answer_seconds
        heard_at = self._clock()
        while True:
            self._news.clear()
            if self._settle():
                heard_at = self._clock()
            await self._check()
            if is_done() or not all(share.is_open for share in self._shares):
                return
            for index in reversed(range(len(self._shares))):
                await self._ask(index)
            await self._check()
            try:
                async with asyncio.timeout_at(heard_at + limit):
                    await self._news.wait()
            except TimeoutError:
                silent = next(share for share in self._shares if share.requests)
                assert silent.connection is not None
                silent.connection.fail(silent.connection.lost(f"no answer within {limit:g} s"))

    def _settle(self) -> bool:
        """Take in what has come. Returns whether that was anything."""
        is_news = False
        for index, share in enumerate(self._shares):
            if share.settle(self._sink(index), self._outputs, wire=self._chain.config.wire, mask=self._mask):
                is_news = True
                self._chain.answered(share.peer)
            share.history.settle(share.num_computed)
        for index, (before, after) in enumerate(pairwise(self._shares)):
            if (position := self._ring.broken_at(before, after)) is not None:
                log.info("%s cannot push to %s", before.peer, after.peer)
                for later in self._shares[index + 1 :]:
                    later.unasked_from(position)
        return is_news

    def _sink(self, index: int) -> Sink:
        """Where the outputs of a server go."""
        return self._outputs if index == len(self._shares) - 1 else self._shares[index + 1]

    async def _check(self) -> None:
        """Raise what has befallen a server, once. What it has pushed to others may be wrong: they are asked anew."""
        for index, share in enumerate(self._shares):
            error = share.error
            if error is None or share.is_reported:
                continue
            share.is_reported = True
            self._epoch += 1
            for later in self._shares[index + 1 :]:
                later.doubt()
            if isinstance(error, CannotRewind):
                if share.is_rewound:
                    await share.reset()
                    continue
                raise ServerLost(f"{error.peer} cannot go on with what it was just sent", peer=error.peer)
            if isinstance(error, ServerBusy):
                # Whoever waits for room holds none: two who wait for each other's would wait for ever.
                await self._disconnect()
            raise error

    # -- asking -------------------------------------------------------------------------------------------------------

    async def _ask(self, index: int) -> None:
        """Ask a server, and those that it pushes to, for what they have not been asked for and can be now."""
        share = self._shares[index]
        while share.num_requested < min(share.num_tokens, self._inputs.num_tokens):
            run = self._run(index)
            if any(len(each.requests) >= STEPS_AHEAD for each in run):
                return
            requests, tensors = self._requests(index, run)
            try:
                for each in run:
                    await each.tell(self._epoch, *self._ring.place(each))
                for each, request in zip(run, requests, strict=True):
                    each.expect(request)
                await share.ask(requests[0], tensors, onward=len(run) - 1, last=requests[-1])
            except PeerError:
                return  # that is found with the server that it happened to

    def _run(self, index: int) -> list[Share]:
        """A server, and those after it to which its next step can go on by itself; none if it cannot be asked now."""
        share = self._shares[index]
        if not share.is_usable or not share.is_in(self._epoch):
            return []
        run, position = [share], share.num_requested
        for before, after in pairwise(self._shares[index:]):
            in_step = after.num_requested == position and after.num_tokens <= position
            if not (in_step and after.is_usable and after.is_in(self._epoch) and self._ring.pushes(before, after)):
                break
            run.append(after)
        return run

    def _requests(self, index: int, run: Sequence[Share]) -> tuple[list[Request], dict[TensorName, torch.Tensor]]:
        """The next step for these servers, and the tensors for the first of them."""
        share, start = run[0], run[0].num_requested
        batch_size = self._like.shape[0]
        at_once = max(1, MAX_STEP_TOKENS // batch_size)
        if len(run) > 1:
            at_once = min(at_once, max(1, RING_TOKENS // batch_size))
        end = min(start + at_once, share.num_tokens, self._inputs.num_tokens)
        inputs_BTD = share.history.between(start, end)
        requests: list[Request] = []
        for offset, each in enumerate(run):
            question = self._question_to(index + offset)
            known = self._sink(index + offset).num_tokens if question is None else 0
            requests.append(
                Request(
                    epoch=self._epoch,
                    position=start,
                    inputs=inputs_BTD.shape,
                    dtype=inputs_BTD.dtype,
                    question=question,
                    num_logits=0
                    if question is None
                    else question.within(end, start=start, num_tokens=self._inputs.num_tokens),
                    usual_seconds=_usual_seconds(each.hop, batch_size * (end - start)),
                    skip=0 if offset else max(0, min(known, end) - start),
                    pushed=offset > 0,
                )
            )
        return requests, named_tensors(inputs_BTD, self._position(start, end), self._mask(start, end))

    def _question_to(self, index: int) -> Question | None:
        """What is to be asked instead of outputs."""
        return self._question if index == len(self._shares) - 1 and self._shares[index].hop.server.head else None

    def _position(self, start: int, end: int) -> torch.Tensor | None:
        return None if self._positions is None else self._positions.between(start, end)

    def _mask(self, start: int, end: int) -> torch.Tensor | None:
        return None if self._masks is None else self._masks.between(start, end)

    # -- servers ------------------------------------------------------------------------------------------------------

    async def _mend(self, excluded: Set[Holding]) -> None:
        """Have a server for every block, with a session open on it."""
        if not self._shares:
            self._shares = self._shares_of(await self._route(self.span, excluded), self._inputs)
        for share in [each for each in self._shares if each.error is not None]:
            shares = self._shares_of(await self._route(share.hop.span, excluded), share.history)
            index = self._shares.index(share)
            self._shares[index : index + 1] = shares
            await share.disconnect(goodbye=False)
        if new := [share for share in self._shares if not share.is_open]:
            await asyncio.gather(*(self._connect(share) for share in new))
            await self._check()
            self._ring.tie(self._shares)
            await self._open(new)

    def _shares_of(self, hops: Sequence[Hop], history: History) -> list[Share]:
        """The first of these has this history; those of the others follow from it."""
        histories = (history, *(History(self._chain.store) for _ in hops[1:]))
        return [Share(hop, each, self._news.set) for hop, each in zip(hops, histories, strict=True)]

    async def _route(self, span: Span, excluded: Set[Holding]) -> tuple[Hop, ...]:
        head = self._chain.config.remote_head and span.end == self._chain.model.num_blocks
        return await self._chain.route(span, excluded, head=head)

    async def _connect(self, share: Share) -> None:
        await share.disconnect()  # if it was interrupted while it was being opened
        try:
            share.adopt(await self._chain.connect(share.hop.server))
        except PeerError as error:
            share.error = error

    async def _open(self, shares: Sequence[Share]) -> None:
        """Open sessions. What one server knows already may be what the next knows, so that is waited for."""
        for share in shares:
            if await self._begin(share):
                await self._until_open(share)
        for share in shares:
            await self._until_open(share)

    async def _begin(self, share: Share) -> bool:
        """Ask for a session; returns whether the server may know its beginning."""
        index, known = self._shares.index(share), self._sink(self._shares.index(share)).num_tokens
        if share is self._shares[-1]:
            self._outputs.logits.clear()
        before, after = self._ring.place(share)
        digests = self._digests(index) if share.num_tokens else None
        request = Open(
            model=self._chain.model.key,
            fingerprint=self._chain.fingerprint,
            start=share.hop.span.start,
            end=share.hop.span.end,
            batch_size=self._like.shape[0],
            max_length=self.max_length,
            salt=self._chain.config.salt,
            skip=known,
            epoch=self._epoch,
            before=before,
            after=after,
        )
        with contextlib.suppress(PeerError):  # found with the server
            await share.open(request, digests, token_bytes=self._like.nbytes)
        return digests is not None

    async def _until_open(self, share: Share) -> None:
        sink, wire = self._sink(self._shares.index(share)), self._chain.config.wire
        try:
            async with asyncio.timeout(OPENED_SECONDS):
                while not share.opened(sink, like=self._like, wire=wire):
                    self._news.clear()
                    await self._check()
                    await self._news.wait()
        except TimeoutError:
            assert share.connection is not None
            share.connection.fail(share.connection.lost("does not open a session"))
            await self._check()

    @property
    def _like(self) -> torch.Tensor:
        """Inputs [B, 1, D] of a token."""
        return self._inputs.since(self._inputs.num_tokens - 1)

    def _digests(self, index: int) -> torch.Tensor | None:
        """The names [B, pages, 16] of the inputs with which sequences begin. Padded ones have none."""
        inputs_BSD, question = self._shares[index].history.since(0), self._question_to(index)
        if question is not None:  # of tokens that need no computing, a server knows no logits
            inputs_BSD = inputs_BSD[:, : -question.num_tokens]
        batch_size, num_tokens, _ = inputs_BSD.shape
        if num_tokens < PAGE_TOKENS or self._masks is not None:
            return None
        positions_BS = self._position(0, num_tokens)
        if positions_BS is None:
            positions_BS = torch.arange(num_tokens).expand(batch_size, -1)
        first = root(self._shares[index].hop.span, self._chain.config.salt)
        names = [
            b"".join(page_names(first, hidden, positions))
            for hidden, positions in zip(inputs_BSD, positions_BS, strict=True)
        ]
        digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        return digests.view(batch_size, -1, DIGEST_BYTES)

    async def _disconnect(self) -> None:
        for share in self._shares:
            await share.disconnect()

    async def close(self) -> None:
        """Let the servers forget it. May be called twice."""
        self._closed = True
        if self._step is not None:
            self._step.cancel()
        async with self._busy:
            await self._disconnect()


def _usual_seconds(hop: Hop, num_tokens: int) -> float:
    """What a server says that it takes for so many tokens, without waiting for others."""
    server = hop.server
    speed = server.decode_speed if num_tokens == 1 else server.prefill_speed
    return num_tokens * len(hop.span) / len(server.span) / max(speed, SLOWEST)


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
        log = History(Store())  # a few bytes a token, which stay exact and in memory
        if position:
            log.append(default(0, position).expand(batch_size, -1))
    if piece_BT is None:
        piece_BT = default(position, position + num_tokens).expand(batch_size, -1)
    log.append(piece_BT)
    log.settle(log.num_tokens)
    return log
