"""Servers in a row that compute a span for a session: how they are opened, asked, and listened to.

Every server is asked for whatever of its inputs it has not been asked for yet: by the server before it where that can
push, by us where it cannot. Nothing here knows of failures; a server that takes another's place simply lacks all.
"""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from shoal.adapters import salted
from shoal.client.chain import Chain, named_tensors
from shoal.client.history import History
from shoal.client.logits import Question
from shoal.client.outputs import Outputs, Sink
from shoal.client.request import Request
from shoal.client.ring import Ring
from shoal.client.share import STEPS_AHEAD, Share
from shoal.client.tokens import Tokens
from shoal.errors import PeerError
from shoal.model.factors import Tuning
from shoal.model.prefix import DIGEST_BYTES, PAGE_TOKENS, page_names, root
from shoal.protocol import MAX_STEP_TOKENS, Open
from shoal.routing.route import SLOWEST, Hop
from shoal.spans import Span
from shoal.tensors import TensorName

log = logging.getLogger(__name__)

RING_TOKENS = 256
"""A long prompt goes through the ring in pieces of so many tokens: the servers work on several of them at once."""
OPENED_SECONDS = 10.0


class Lane:
    """The shares of a session on the servers of a route, in order. What the last of them answers goes to `outputs`.

    `history` are the inputs of the first. With a `question`, the last one is asked for logits if it has a head.
    """

    def __init__(
        self,
        chain: Chain,
        tokens: Tokens,
        tuning: Tuning,
        hops: Sequence[Hop],
        history: History,
        *,
        expected_length: Callable[[], int],
        outputs: Outputs,
        news: Callable[[], None],
    ) -> None:
        self.outputs = outputs
        self.question: Question | None = None
        self._chain = chain
        self._tokens = tokens
        self._tuning = tuning
        self._expected_length = expected_length
        self.news = news
        self._ring = Ring(chain.broken_pairs, wire=chain.config.wire)
        self.shares = self.shares_on(hops, history)

    def shares_on(self, hops: Sequence[Hop], history: History) -> list[Share]:
        """Shares on other servers. The first has this history; those of the others follow from it."""
        histories = (history, *(History(self._chain.store) for _ in hops[1:]))
        return [Share(hop, each, self.news) for hop, each in zip(hops, histories, strict=True)]

    def replace(self, share: Share, others: Sequence[Share]) -> None:
        """These take the place of a share."""
        index = self.shares.index(share)
        self.shares[index : index + 1] = others

    async def merge(self) -> None:
        """Where one server has come to follow itself, it gets one session, which takes half of the room of two."""
        index = 0
        while index + 1 < len(self.shares):
            first, second = self.shares[index : index + 2]
            new = next((share for share in (second, first) if not share.is_open), None)
            span = Span(first.hop.span.start, second.hop.span.end)
            if new is None or first.peer != second.peer or span not in new.hop.server.span:
                index += 1
                continue
            self.shares[index : index + 2] = self.shares_on([Hop(new.hop.server, span)], first.history)
            for share in (first, second):
                await share.disconnect()

    @property
    def is_open(self) -> bool:
        return all(share.is_open for share in self.shares)

    def sink(self, index: int) -> Sink:
        """Where the outputs of a server go."""
        return self.outputs if index == len(self.shares) - 1 else self.shares[index + 1]

    # -- listening ----------------------------------------------------------------------------------------------------

    def settle(self) -> bool:
        """Take in what has come. Returns whether that was anything."""
        is_news = False
        for index, share in enumerate(self.shares):
            if share.settle(self.sink(index), self.outputs, wire=self._chain.config.wire, mask=self._tokens.mask):
                is_news = True
                self._chain.answered(share.hop, share.took)
                share.took.clear()
            share.history.settle(share.num_computed)
        for index, (before, after) in enumerate(pairwise(self.shares)):
            if (position := self._ring.broken_at(before, after)) is not None:
                log.info("%s cannot push to %s", before.peer, after.peer)
                self._tokens.epoch += 1  # what is pushed nevertheless comes too late
                for later in self.shares[index + 1 :]:
                    later.unasked_from(position)
        return is_news

    def next_failure(self) -> Share | None:
        """A server to which something has happened, each once. What it has pushed may be wrong: that is asked anew."""
        for index, share in enumerate(self.shares):
            if share.error is not None and not share.is_reported:
                share.is_reported = True
                if later := self.shares[index + 1 :]:
                    self._tokens.epoch += 1
                for each in later:
                    each.doubt()
                return share
        return None

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(self, limit: int, *, at_once: int | None = None) -> None:
        """Ask all for what they have not been asked for and can be now, of the first `limit` tokens.

        With `at_once`, one step at a time, and of no more tokens than that.
        """
        for index in reversed(range(len(self.shares))):
            with contextlib.suppress(PeerError):  # found with the server that it happened to
                await self._ask(index, limit, at_once)

    async def _ask(self, index: int, limit: int, at_once: int | None) -> None:
        share = self.shares[index]
        steps_ahead = STEPS_AHEAD if at_once is None else 1
        while share.num_requested < min(share.num_tokens, limit):
            run = self._run(index)
            if not run or any(len(each.requests) >= steps_ahead for each in run):
                return
            epoch = self._tokens.epoch
            for each in run:
                await each.tell(epoch, *self._ring.place(each))
            if self._tokens.epoch != epoch:
                continue  # something happened meanwhile, perhaps to another lane: these are to be told of it first
            requests, tensors = self._requests(index, run, limit, at_once or MAX_STEP_TOKENS)
            for each, request in zip(run, requests, strict=True):
                each.expect(request)
            await share.ask(requests[0], tensors, onward=len(run) - 1, last=requests[-1])

    def _run(self, index: int) -> list[Share]:
        """A server, and those after it to which its next step goes on by itself; none if it cannot be asked now."""
        share = self.shares[index]
        if not share.is_usable or not share.is_in(self._tokens.epoch):
            return []
        run, position = [share], share.num_requested
        for before, after in pairwise(self.shares[index:]):
            in_step = after.num_requested == position and after.num_tokens <= position
            usable = after.is_usable and after.is_in(self._tokens.epoch)
            if not (in_step and usable and self._ring.pushes(before, after)):
                break
            run.append(after)
        return run

    def _requests(
        self, index: int, run: Sequence[Share], limit: int, at_once: int
    ) -> tuple[list[Request], dict[TensorName, torch.Tensor]]:
        """The next step for these servers, and the tensors for the first of them."""
        share, start = run[0], run[0].num_requested
        batch_size = self._tokens.like.shape[0]
        if len(run) > 1:
            at_once = min(at_once, RING_TOKENS)
        end = min(start + max(1, at_once // batch_size), share.num_tokens, limit)
        inputs_BTD = share.history.between(start, end)
        requests: list[Request] = []
        for offset, each in enumerate(run):
            question = self._question_to(index + offset)
            known = self.sink(index + offset).num_tokens if question is None else 0
            num_logits = 0
            if question is not None:
                num_logits = question.within(end, start=start, num_tokens=self._tokens.num_tokens)
            requests.append(
                Request(
                    epoch=self._tokens.epoch,
                    position=start,
                    inputs=inputs_BTD.shape,
                    dtype=inputs_BTD.dtype,
                    question=question,
                    num_logits=num_logits,
                    usual_seconds=_usual_seconds(each.hop, batch_size * (end - start)),
                    skip=0 if offset else max(0, min(known, end) - start),
                    pushed=offset > 0,
                )
            )
        return requests, named_tensors(inputs_BTD, self._tokens.positions(start, end), self._tokens.mask(start, end))

    def _question_to(self, index: int) -> Question | None:
        """What is to be asked instead of outputs."""
        return self.question if index == len(self.shares) - 1 and self.shares[index].hop.server.head else None

    # -- opening ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Have a session open on every server, as far as none of them fails."""
        new = [share for share in self.shares if not share.is_open]
        await asyncio.gather(*(self._connect(share) for share in new))
        if any(share.error is not None for share in self.shares):
            return
        self._ring.tie(self.shares)
        # What one server knows already may be what the next knows, so that is waited for.
        for share in new:
            if await self._begin(share):
                await self._opened(share)
        for share in new:
            await self._opened(share)

    async def _connect(self, share: Share) -> None:
        await share.disconnect()  # if it was interrupted while it was being opened
        try:
            connection = await self._chain.connect(share.hop.server)
            try:
                adapters = self._tuning.of(share.hop.span)
                await self._chain.taught.teach(connection, share.hop.server, adapters, session=True)
            except BaseException:
                await connection.close()
                raise
            share.adopt(connection)
        except PeerError as error:
            share.error = error

    async def _begin(self, share: Share) -> bool:
        """Ask for a session; returns whether the server may know its beginning."""
        index = self.shares.index(share)
        if index == len(self.shares) - 1:
            self.outputs.logits.clear()
        before, after = self._ring.place(share)
        digests = self._digests(index) if share.num_tokens else None
        like = self._tokens.like
        request = Open(
            model=self._chain.model.key,
            fingerprint=self._chain.fingerprint,
            start=share.hop.span.start,
            end=share.hop.span.end,
            adapters=self._tuning.names(share.hop.span),
            batch_size=like.shape[0],
            max_length=self._expected_length(),
            salt=self._chain.config.salt,
            skip=self.sink(index).num_tokens,
            epoch=self._tokens.epoch,
            before=before,
            after=after,
        )
        with contextlib.suppress(PeerError):  # found with the server
            await share.open(request, digests)
        return digests is not None

    async def _opened(self, share: Share) -> None:
        """Wait until a session is open, or cannot be; one that lacks its adapters is to be connected anew."""
        if share.connection is None:
            return
        sink, wire = self.sink(self.shares.index(share)), self._chain.config.wire
        try:
            async with asyncio.timeout(OPENED_SECONDS):
                while (
                    share.error is None
                    and share.lacking is None
                    and not share.opened(sink, like=self._tokens.like, wire=wire)
                ):
                    await share.has_news.wait()
                    share.has_news.clear()
        except TimeoutError:
            share.connection.fail(share.connection.lost("does not open a session"))
        if (lacking := share.lacking) is not None:
            self._chain.taught.forget(share.peer, self._tuning.of(share.hop.span), lacking.adapters)
            await share.reset()  # it is opened again, and taught before

    def _digests(self, index: int) -> torch.Tensor | None:
        """The names [B, pages, 16] of the inputs with which sequences begin. Padded ones have none."""
        inputs_BSD, question = self.shares[index].history.since(0), self._question_to(index)
        if question is not None:  # of tokens that need no computing, a server knows no logits
            inputs_BSD = inputs_BSD[:, : -question.num_tokens]
        batch_size, num_tokens, _ = inputs_BSD.shape
        if num_tokens < PAGE_TOKENS or self._tokens.are_padded:
            return None
        positions_BS = self._tokens.positions(0, num_tokens)
        if positions_BS is None:
            positions_BS = torch.arange(num_tokens).expand(batch_size, -1)
        span = self.shares[index].hop.span
        first = root(span, salted(self._chain.config.salt, self._tuning.names(span)))
        names = [
            b"".join(page_names(first, hidden, positions))
            for hidden, positions in zip(inputs_BSD, positions_BS, strict=True)
        ]
        digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        return digests.view(batch_size, -1, DIGEST_BYTES)

    async def disconnect(self) -> None:
        """Let the servers forget it."""
        for share in self.shares:
            await share.disconnect()


def _usual_seconds(hop: Hop, num_tokens: int) -> float:
    """What a server says that it takes for so many tokens, without waiting for others."""
    server = hop.server
    speed = server.decode_speed if num_tokens == 1 else server.prefill_speed
    return num_tokens * len(hop.span) / len(server.span) / max(speed or 0.0, SLOWEST)
