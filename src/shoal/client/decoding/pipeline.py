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
from shoal.client.decoding.outputs import Outputs, Sink
from shoal.client.decoding.pending_step import PendingStep
from shoal.client.decoding.push_links import PushLinks
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import MAX_STEPS_IN_FLIGHT, Stage
from shoal.client.head.logits import LogitsRequest
from shoal.client.history.history import History
from shoal.client.swarm.swarm import Swarm, named_tensors
from shoal.errors import PeerError
from shoal.events import StageReplaced
from shoal.model.peft.factors import Tuning
from shoal.policy.routing.route import SLOWEST, Hop
from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS, page_names, root
from shoal.protocol import MAX_STEP_TOKENS, Open
from shoal.spans import Span
from shoal.tensors import TensorName

log = logging.getLogger(__name__)

PREFILL_PIECE_TOKENS = 256
"""A long prompt goes through the ring in pieces of so many tokens: the servers work on several of them at once."""
OPEN_TIMEOUT_SECONDS = 10.0


class Pipeline:
    """The shares of a session on the servers of a route, in order. What the last of them answers goes to `outputs`.

    `history` are the inputs of the first. With a `logits_request`, the last one is asked for logits if it has a head.
    """

    def __init__(
        self,
        swarm: Swarm,
        tokens: SessionInputs,
        tuning: Tuning,
        hops: Sequence[Hop],
        history: History,
        *,
        expected_length: Callable[[], int],
        outputs: Outputs,
        notify: Callable[[], None],
    ) -> None:
        self.outputs = outputs
        self.logits_request: LogitsRequest | None = None
        self._swarm = swarm
        self._tokens = tokens
        self._tuning = tuning
        self._expected_length = expected_length
        self.notify = notify
        self._links = PushLinks(swarm.broken_pairs, wire=swarm.config.wire)
        self.stages = self.stages_on(hops, history)

    def stages_on(self, hops: Sequence[Hop], history: History) -> list[Stage]:
        """Shares on other servers. The first has this history; those of the others follow from it."""
        histories = (history, *(History(self._swarm.store) for _ in hops[1:]))
        return [Stage(hop, each, self.notify) for hop, each in zip(hops, histories, strict=True)]

    def replace(self, stage: Stage, others: Sequence[Stage]) -> None:
        """These take the place of a share."""
        index = self.stages.index(stage)
        self.stages[index : index + 1] = others
        self._swarm.events.emit(StageReplaced(stage.peer, tuple(each.peer for each in others)))

    async def merge(self) -> None:
        """Where one server has come to follow itself, it gets one session, which takes half of the room of two."""
        index = 0
        while index + 1 < len(self.stages):
            first, second = self.stages[index : index + 2]
            new = next((stage for stage in (second, first) if not stage.is_open), None)
            span = Span(first.hop.span.start, second.hop.span.end)
            if new is None or first.peer != second.peer or span not in new.hop.server.span:
                index += 1
                continue
            self.stages[index : index + 2] = self.stages_on([Hop(new.hop.server, span)], first.history)
            for stage in (first, second):
                await stage.disconnect()

    @property
    def is_open(self) -> bool:
        return all(stage.is_open for stage in self.stages)

    def sink(self, index: int) -> Sink:
        """Where the outputs of a server go."""
        return self.outputs if index == len(self.stages) - 1 else self.stages[index + 1]

    # -- listening ----------------------------------------------------------------------------------------------------

    def settle(self) -> bool:
        """Take in what has come. Returns whether that was anything."""
        has_progress = False
        for index, stage in enumerate(self.stages):
            if stage.settle(self.sink(index), self.outputs, wire=self._swarm.config.wire, mask=self._tokens.mask):
                has_progress = True
                self._swarm.record_answer(stage.hop, stage.took)
                stage.took.clear()
            stage.history.settle(stage.num_computed)
        for index, (upstream, downstream) in enumerate(pairwise(self.stages)):
            if (position := self._links.broken_at(upstream, downstream)) is not None:
                log.info("%s cannot push to %s", upstream.peer, downstream.peer)
                self._tokens.epoch += 1  # what is pushed nevertheless comes too late
                for later in self.stages[index + 1 :]:
                    later.unrequest_from(position)
        return has_progress

    def next_failure(self) -> Stage | None:
        """A server to which something has happened, each once. What it has pushed may be wrong: that is asked anew."""
        for index, stage in enumerate(self.stages):
            if stage.error is not None and not stage.is_reported:
                stage.is_reported = True
                if later := self.stages[index + 1 :]:
                    self._tokens.epoch += 1
                for each in later:
                    each.forget_unanswered()
                return stage
        return None

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(self, limit: int, *, max_tokens: int | None = None) -> None:
        """Ask all for what they have not been asked for and can be now, of the first `limit` tokens.

        With `max_tokens`, one step at a time, and of no more tokens than that.
        """
        for index in reversed(range(len(self.stages))):
            with contextlib.suppress(PeerError):  # found with the server that it happened to
                await self._ask(index, limit, max_tokens)

    async def _ask(self, index: int, limit: int, max_tokens: int | None) -> None:
        stage = self.stages[index]
        steps_ahead = MAX_STEPS_IN_FLIGHT if max_tokens is None else 1
        while stage.num_requested < min(stage.num_tokens, limit):
            run = self._run(index)
            if not run or any(len(each.requests) >= steps_ahead for each in run):
                return
            epoch = self._tokens.epoch
            for each in run:
                await each.sync_neighbors(epoch, *self._links.neighbors_of(each))
            if self._tokens.epoch != epoch:
                continue  # something happened meanwhile, perhaps to another lane: these are to be told of it first
            requests, tensors = self._requests(index, run, limit, max_tokens or MAX_STEP_TOKENS)
            for each, request in zip(run, requests, strict=True):
                each.expect(request)
            await stage.ask(requests[0], tensors, hops_left=len(run) - 1, last=requests[-1])

    def _run(self, index: int) -> list[Stage]:
        """A server, and those after it to which its next step goes on by itself; none if it cannot be asked now."""
        stage = self.stages[index]
        if not stage.is_usable or not stage.is_in(self._tokens.epoch):
            return []
        run, position = [stage], stage.num_requested
        for upstream, downstream in pairwise(self.stages[index:]):
            in_step = downstream.num_requested == position and downstream.num_tokens <= position
            usable = downstream.is_usable and downstream.is_in(self._tokens.epoch)
            if not (in_step and usable and self._links.pushes(upstream, downstream)):
                break
            run.append(downstream)
        return run

    def _requests(
        self, index: int, run: Sequence[Stage], limit: int, max_tokens: int
    ) -> tuple[list[PendingStep], dict[TensorName, torch.Tensor]]:
        """The next step for these servers, and the tensors for the first of them."""
        stage, start = run[0], run[0].num_requested
        batch_size = self._tokens.like.shape[0]
        if len(run) > 1:
            max_tokens = min(max_tokens, PREFILL_PIECE_TOKENS)
        end = min(start + max(1, max_tokens // batch_size), stage.num_tokens, limit)
        inputs_BTD = stage.history.between(start, end)
        requests: list[PendingStep] = []
        for offset, each in enumerate(run):
            logits_request = self._logits_request_for(index + offset)
            known = self.sink(index + offset).num_tokens if logits_request is None else 0
            num_logits = 0
            if logits_request is not None:
                num_logits = logits_request.within(end, start=start, num_tokens=self._tokens.num_tokens)
            requests.append(
                PendingStep(
                    epoch=self._tokens.epoch,
                    position=start,
                    inputs=inputs_BTD.shape,
                    dtype=inputs_BTD.dtype,
                    logits_request=logits_request,
                    num_logits=num_logits,
                    usual_seconds=_usual_seconds(each.hop, batch_size * (end - start)),
                    skip=0 if offset else max(0, min(known, end) - start),
                    pushed=offset > 0,
                )
            )
        return requests, named_tensors(inputs_BTD, self._tokens.positions(start, end), self._tokens.mask(start, end))

    def _logits_request_for(self, index: int) -> LogitsRequest | None:
        """What is to be asked instead of outputs."""
        return self.logits_request if index == len(self.stages) - 1 and self.stages[index].hop.server.head else None

    # -- opening ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Have a session open on every server, as far as none of them fails."""
        new = [stage for stage in self.stages if not stage.is_open]
        await asyncio.gather(*(self._connect(stage) for stage in new))
        if any(stage.error is not None for stage in self.stages):
            return
        self._links.link(self.stages)
        # What one server knows already may be what the next knows, so that is waited for.
        for stage in new:
            if await self._send_open(stage):
                await self._await_opened(stage)
        for stage in new:
            await self._await_opened(stage)

    async def _connect(self, stage: Stage) -> None:
        await stage.disconnect()  # if it was interrupted while it was being opened
        try:
            connection = await self._swarm.connect(stage.hop.server)
            try:
                adapters = self._tuning.of(stage.hop.span)
                await self._swarm.adapter_sync.ensure_loaded(connection, stage.hop.server, adapters, session=True)
            except BaseException:
                await connection.close()
                raise
            stage.adopt(connection)
        except PeerError as error:
            stage.error = error

    async def _send_open(self, stage: Stage) -> bool:
        """Ask for a session; returns whether the server may know its beginning."""
        index = self.stages.index(stage)
        if index == len(self.stages) - 1:
            self.outputs.logits.clear()
        upstream, downstream = self._links.neighbors_of(stage)
        digests = self._digests(index) if stage.num_tokens else None
        like = self._tokens.like
        request = Open(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=stage.hop.span.start,
            end=stage.hop.span.end,
            adapters=self._tuning.names(stage.hop.span),
            batch_size=like.shape[0],
            max_length=self._expected_length(),
            salt=self._swarm.config.salt,
            skip=self.sink(index).num_tokens,
            epoch=self._tokens.epoch,
            upstream=upstream,
            downstream=downstream,
        )
        with contextlib.suppress(PeerError):  # found with the server
            await stage.open(request, digests)
        return digests is not None

    async def _await_opened(self, stage: Stage) -> None:
        """Wait until a session is open, or cannot be; one that lacks its adapters is to be connected anew."""
        if stage.connection is None:
            return
        sink, wire = self.sink(self.stages.index(stage)), self._swarm.config.wire
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                while (
                    stage.error is None
                    and stage.not_cached is None
                    and not stage.opened(sink, like=self._tokens.like, wire=wire)
                ):
                    await stage.has_news.wait()
                    stage.has_news.clear()
        except TimeoutError:
            stage.connection.fail(stage.connection.lost("does not open a session"))
        if (not_cached := stage.not_cached) is not None:
            self._swarm.adapter_sync.forget(stage.peer, self._tuning.of(stage.hop.span), not_cached.adapters)
            await stage.reset()  # it is opened again, and taught before

    def _digests(self, index: int) -> torch.Tensor | None:
        """The names [B, pages, 16] of the inputs with which sequences begin. Padded ones have none."""
        inputs_BSD, logits_request = self.stages[index].history.since(0), self._logits_request_for(index)
        if logits_request is not None:  # of tokens that need no computing, a server knows no logits
            inputs_BSD = inputs_BSD[:, : -logits_request.num_tokens]
        batch_size, num_tokens, _ = inputs_BSD.shape
        if num_tokens < PAGE_TOKENS or self._tokens.are_padded:
            return None
        positions_BS = self._tokens.positions(0, num_tokens)
        if positions_BS is None:
            positions_BS = torch.arange(num_tokens).expand(batch_size, -1)
        span = self.stages[index].hop.span
        first = root(span, salted(self._swarm.config.salt, self._tuning.names(span)))
        names = [
            b"".join(page_names(first, hidden, positions))
            for hidden, positions in zip(inputs_BSD, positions_BS, strict=True)
        ]
        digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        return digests.view(batch_size, -1, DIGEST_BYTES)

    async def disconnect(self) -> None:
        """Let the servers forget it."""
        for stage in self.stages:
            await stage.disconnect()


def _usual_seconds(hop: Hop, num_tokens: int) -> float:
    """What a server says that it takes for so many tokens, without waiting for others."""
    server = hop.server
    speed = server.decode_speed if num_tokens == 1 else server.prefill_speed
    return num_tokens * len(hop.span) / len(server.span) / max(speed or 0.0, SLOWEST)
