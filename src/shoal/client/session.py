"""A generation in progress: what the servers cache, and what the client keeps so that any of them can be replaced.

A step goes around a ring: to the first server, from each straight to the next, and from the last one back. Each also
sends its outputs to us, off the critical path: they are the inputs of the next, from which that could be rebuilt
anywhere. So there is nothing special about a failure: a replacement lacks everything, and is asked for that as any
server is asked for what it lacks (`shoal.client.lane`).
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch

from shoal.client.chain import Chain, Holding
from shoal.client.connection import CannotRewind
from shoal.client.lane import Lane
from shoal.client.logits import Logits, Question
from shoal.client.outputs import Nowhere, Outputs
from shoal.client.routes import Routes
from shoal.client.share import Share
from shoal.client.tending import Tending
from shoal.client.tokens import Tokens
from shoal.errors import ServerBusy, ServerLost, UserError
from shoal.model.factors import Tuning
from shoal.net.encodings import as_received
from shoal.routing.route import Hop
from shoal.spans import Span

Change = int | tuple[int, ...]
"""What is to be done before the next step: forget everything after so many tokens, or rearrange the batch."""


class Session:
    """The decoding state of a batch of sequences across a route. Runs on the client's event loop.

    It may get `max_length` tokens long. Servers are chosen that have room for `expected_length`, by default the same.
    """

    def __init__(
        self,
        chain: Chain,
        span: Span,
        *,
        batch_size: int,
        max_length: int,
        expected_length: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.span = span
        self._chain = chain
        self._tokens = Tokens(chain.store)
        self._routes = Routes(
            chain,
            self._tokens,
            tuning or Tuning(),
            batch_size=batch_size,
            max_length=max_length,
            announced_length=max_length if expected_length is None else min(expected_length, max_length),
        )
        self._changes: list[Change] = []
        self._news = asyncio.Event()
        self._busy = asyncio.Lock()
        self._step: asyncio.Task[Any] | None = None  # the one that runs
        self._tending: Tending | None = None  # from the first step on
        self._closed = False

    @property
    def batch_size(self) -> int:
        return self._routes.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._routes.batch_size = batch_size

    def expect(self, num_tokens: int) -> None:
        """It will perhaps get so long: servers that are chosen from now on need room for that."""
        self._routes.announced_length = max(self._routes.announced_length, num_tokens)

    @property
    def was_opened(self) -> bool:
        """Whether any server knows of it."""
        return self._tending is not None or self._step is not None

    @property
    def _lanes(self) -> list[Lane]:
        """The one on which steps run, and those of the spare servers."""
        return [] if self._tending is None else [self._tending.lane, *self._tending.spares.values()]

    @property
    def _shares(self) -> list[Share]:
        return self._lanes[0].shares if self._lanes else []

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Where it runs at present."""
        return tuple(share.hop for share in self._shares)

    @property
    def spares(self) -> tuple[Hop, ...]:
        """The servers that are kept warm to take another's place."""
        return tuple(share.hop for lane in self._lanes[1:] for share in lane.shares if lane.is_open)

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
        mask_BS: torch.Tensor | None,
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
                self._tokens.append(as_received(hidden_BTD, self._chain.config.wire), positions_BT, mask_BS)
                outputs = Outputs(position)
                await self._reach(self._is_answered, outputs, question)
                return outputs.joined()
            finally:
                self._step = None
                if self._tending is not None:
                    self._tending.wake()

    # -- going back, and rearranging ----------------------------------------------------------------------------------

    async def _make_changes(self) -> None:
        """Do what was asked for since the last step, once the inputs of all servers are known up to there."""
        while self._changes:
            change = self._changes[0]
            if isinstance(change, tuple):
                await self._reach(self._is_settled)
                self._tokens.select_rows(change)
                others = dict.fromkeys(share.history for share in self._everywhere())
                others.pop(self._tokens.inputs, None)
                for history in others:  # each once: that of a spare server is that of the one that it may replace
                    history.select_rows(change)
                for share in self._everywhere():
                    share.rearranged(change)
                self._tokens.epoch += 1
            elif self._reaches_beyond(change):
                self._tokens.crop(change)
                await self._reach(self._is_settled)
                for share in self._everywhere():
                    share.crop(change)
                self._tokens.epoch += 1
            self._changes.pop(0)

    def _everywhere(self) -> list[Share]:
        """Those of the spare servers too."""
        return [share for lane in self._lanes for share in lane.shares]

    def _reaches_beyond(self, num_tokens: int) -> bool:
        """Whether anything is known or asked beyond so many tokens."""
        ends = (max(share.num_tokens, share.num_requested) for share in self._everywhere())
        return max((self._tokens.num_tokens, *ends)) > num_tokens

    def _is_settled(self) -> bool:
        """Whether all inputs are known that any server was given: then nothing depends on what is on its way."""
        return all(share.num_tokens >= self._tokens.num_tokens for share in self._shares)

    def _is_answered(self) -> bool:
        """Whether the outputs, or the answer to the question, are here."""
        return bool(self._shares) and self._shares[-1].num_computed >= self._tokens.num_tokens

    def _is_whole(self) -> bool:
        """Whether every server is there, and has computed all that there is."""
        num_tokens = self._tokens.num_tokens
        return all(share.is_open and share.error is None and share.num_computed >= num_tokens for share in self._shares)

    # -- the one procedure --------------------------------------------------------------------------------------------

    async def _reach(
        self, is_done: Callable[[], bool], outputs: Outputs | None = None, question: Question | None = None
    ) -> None:
        """Let the servers compute what they have not, until this is so, replacing those that fail."""
        outputs = outputs or Nowhere()

        async def act(excluded: Set[Holding]) -> None:
            while not is_done():
                if self._tending is None:
                    route = await self._routes.over(self.span, excluded)
                    self._tending = self._tend(self._routes.lane(route, self._tokens.inputs, self._tell))
                lane = self._tending.lane
                lane.outputs, lane.question = outputs, question
                await self._check(lane)
                await self._mend(self._tending, excluded)
                await self._pump(lane, is_done)

        if not is_done():
            await self._chain.persist(self.span, act)

    async def _pump(self, lane: Lane, is_done: Callable[[], bool]) -> None:
        """Ask, and look at what comes. Returns when it is done, or a session has to be opened again."""
        clock, limit = asyncio.get_running_loop().time, self._chain.config.longest_answer_seconds
        heard_at = clock()
        while True:
            self._news.clear()
            if lane.settle():
                heard_at = clock()
            await self._check(lane)
            if is_done() or not lane.is_open:
                return
            await lane.ask(self._tokens.num_tokens)
            await self._check(lane)
            try:
                async with asyncio.timeout_at(heard_at + limit):
                    await self._news.wait()
            except TimeoutError:
                silent = next((share for share in lane.shares if share.requests), lane.shares[-1])
                assert silent.connection is not None
                silent.connection.fail(silent.connection.lost(f"no answer within {limit:g} s"))

    async def _check(self, lane: Lane) -> None:
        """Raise what has befallen a server, once."""
        while (share := lane.next_failure()) is not None:
            error = share.error
            assert error is not None
            if isinstance(error, CannotRewind):
                if not share.is_rewound:
                    raise ServerLost(f"{error.peer} cannot go on with what it was just sent", peer=error.peer)
                await share.reset()
                continue
            if isinstance(error, ServerBusy):
                # Whoever waits for room holds none: two who wait for each other's would wait for ever.
                for each in self._lanes:
                    await each.disconnect()
            raise error

    async def _mend(self, tending: Tending, excluded: Set[Holding]) -> None:
        """Have a session open on a server for every block."""
        lane = tending.lane
        for share in [each for each in lane.shares if each.error is not None]:
            if not tending.promote(share):
                route = await self._routes.instead_of(share, lane, excluded)
                lane.replace(share, lane.shares_on(route.hops, share.history))
            await share.disconnect(goodbye=False)
        await lane.merge()
        await lane.open()
        await self._check(lane)

    # -- meanwhile ----------------------------------------------------------------------------------------------------

    def _tend(self, lane: Lane) -> Tending:
        """Look after these servers until the session is closed."""
        mend = partial(self._reach, self._is_whole)
        return Tending(self._chain, self._tokens, self._routes, lane, busy=self._busy, mend=mend)

    def _tell(self) -> None:
        """Something came from a server."""
        self._news.set()
        if self._tending is not None and any(share.leaves or share.error is not None for share in self._shares):
            self._tending.wake()

    async def close(self) -> None:
        """Let the servers forget it. May be called twice."""
        self._closed = True
        if self._step is not None:
            self._step.cancel()
        if self._tending is not None:
            self._tending.stop()
        async with self._busy:
            for lane in self._lanes:
                await lane.disconnect()
