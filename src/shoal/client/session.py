"""A generation in progress: what the servers cache, and what the client keeps so that any of them can be replaced.

A step goes around a ring: to the first server, from each straight to the next, and from the last one back. Each also
sends its outputs to us, off the critical path: they are the inputs of the next, from which that could be rebuilt
anywhere. So there is nothing special about a failure: a replacement lacks everything, and is asked for that as any
server is asked for what it lacks (`shoal.client.lane`).
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch

from shoal.client.chain import Chain, Holding, holding
from shoal.client.clock import now
from shoal.client.connection import CannotRewind
from shoal.client.history import History
from shoal.client.lane import Lane
from shoal.client.logits import Logits, Question
from shoal.client.outputs import Nowhere, Outputs
from shoal.client.share import Share
from shoal.client.tokens import Tokens
from shoal.errors import MissingBlocks, ServerBusy, ServerLost, SwarmError, UserError
from shoal.net.encodings import as_received
from shoal.routing.moving import pays_to_move, replay_seconds
from shoal.routing.route import Hop, Needs, Route
from shoal.spans import ServerInfo, Span

log = logging.getLogger(__name__)

FEED_TOKENS = 32
"""A spare server is given what it lacks when that is so much: a pass for so many costs hardly more than for one."""
SPARE_TOKENS = 128
"""At most so much at once: whoever decodes on that server waits for a pass at most."""
TEND_SECONDS = 10.0
"""How long after no spare server could be found one is looked for again."""

LOOK_TOKENS = 32
"""So often it is considered whether others would be faster."""

Change = int | tuple[int, ...]
"""What is to be done before the next step: forget everything after so many tokens, or rearrange the batch."""


class Session:
    """The decoding state of a batch of sequences across a route. Runs on the client's event loop."""

    def __init__(self, chain: Chain, span: Span, *, batch_size: int, max_length: int) -> None:
        self.span = span
        self.batch_size = batch_size
        self.max_length = max_length
        self._chain = chain
        self._tokens = Tokens(chain.store)
        self._lane: Lane | None = None
        self._spares: dict[Share, Lane] = {}
        self._changes: list[Change] = []
        self._news = asyncio.Event()
        self._chores = asyncio.Event()
        self._busy = asyncio.Lock()
        self._step: asyncio.Task[Any] | None = None  # the one that runs
        self._tending: asyncio.Task[None] | None = None
        self._no_spare_until: WeakKeyDictionary[Share, float] = WeakKeyDictionary()
        self._looked_at = 0
        self._closed = False

    @property
    def _shares(self) -> list[Share]:
        return [] if self._lane is None else self._lane.shares

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Where it runs at present."""
        return tuple(share.hop for share in self._shares)

    @property
    def spares(self) -> tuple[Hop, ...]:
        """The servers that are kept warm to take another's place."""
        return tuple(share.hop for lane in self._spares.values() for share in lane.shares if lane.is_open)

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
            self._tending = self._tending or asyncio.create_task(self._tend())
            self._step = asyncio.current_task()
            try:
                self._changes.append(position)  # what an interrupted step may have left
                await self._make_changes()
                self._tokens.append(as_received(hidden_BTD, self._chain.config.wire), positions_BT, mask_BT)
                outputs = Outputs(position)
                await self._reach(self._is_answered, outputs, question)
                return outputs.joined()
            finally:
                self._step = None
                self._chores.set()

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
        return [*self._shares, *(share for lane in self._spares.values() for share in lane.shares)]

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
                if self._lane is None:
                    route = await self._route(excluded)
                    self._lane = self._lane_on(route.hops, self._tokens.inputs, self._tell)
                self._lane.outputs, self._lane.question = outputs, question
                await self._check(self._lane)
                await self._mend(self._lane, excluded)
                await self._pump(self._lane, is_done)

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
                for each in (lane, *self._spares.values()):
                    await each.disconnect()
            raise error

    async def _mend(self, lane: Lane, excluded: Set[Holding]) -> None:
        """Have a session open on a server for every block."""
        for share in [each for each in lane.shares if each.error is not None]:
            spare = self._spares.get(share)
            if spare is not None and spare.is_open and all(each.error is None for each in spare.shares):
                log.info("%s takes the place of %s", ", ".join(each.peer for each in spare.shares), share.peer)
                self._promote(lane, share, spare)
            else:
                route = await self._route(excluded, share)
                lane.replace(share, lane.shares_on(route.hops, share.history))
            await share.disconnect(goodbye=False)
        await lane.merge()
        await lane.open()
        await self._check(lane)

    def _promote(self, lane: Lane, share: Share, spare: Lane) -> None:
        """A spare server takes the place of another. What it knew that had not been answered, it has to say again."""
        del self._spares[share]
        for each in spare.shares:
            each.news = self._tell
        sink = lane.sink(lane.shares.index(share))
        if spare.shares[-1].num_computed > sink.num_tokens:
            spare.shares[-1].uncomputed_from(sink.num_tokens)
            self._tokens.epoch += 1
        if sink is lane.outputs:
            lane.outputs.logits.clear()
        lane.replace(share, spare.shares)

    def _lane_on(self, hops: Sequence[Hop], history: History, news: Callable[[], None]) -> Lane:
        return Lane(self._chain, self._tokens, hops, history, max_length=self.max_length, outputs=Nowhere(), news=news)

    async def _route(self, excluded: Set[Holding], share: Share | None = None) -> Route:
        """Servers for all blocks, or for those of one that stands between others."""
        span = self.span if share is None else share.hop.span
        before, after = self._neighbours(share)
        return await self._chain.route(span, excluded, needs=self._needs(span), before=before, after=after)

    def _neighbours(self, share: Share | None) -> tuple[ServerInfo | None, ServerInfo | None]:
        """The servers before and after one in the ring; None where that is the client."""
        if share is None:
            return None, None
        index = self._shares.index(share)
        before = self._shares[index - 1].hop.server if index else None
        after = self._shares[index + 1].hop.server if index + 1 < len(self._shares) else None
        return before, after

    def _needs(self, span: Span) -> Needs:
        num_tokens = self._tokens.num_tokens
        return Needs(
            step_tokens=self.batch_size,
            prompt_tokens=self.batch_size * num_tokens,
            num_steps=max(1, self.max_length - num_tokens),
            needed_tokens=self.batch_size * self.max_length,
            head=self._chain.config.remote_head and span.end == self._chain.model.num_blocks,
            dtype=str(self._tokens.like.dtype).removeprefix("torch.") if num_tokens else None,
        )

    def _tell(self) -> None:
        """Something came from a server."""
        self._news.set()
        if any(share.leaves or share.error is not None for share in self._shares):
            self._chores.set()

    # -- meanwhile ----------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """Do what is not urgent: replace servers that fail while nobody waits, and keep others warm for the next."""
        while True:
            is_quiet = False
            try:
                async with asyncio.timeout(TEND_SECONDS):
                    await self._chores.wait()
            except TimeoutError:
                is_quiet = True
            self._chores.clear()
            try:
                await self._repair()
                await self._look_around()
                for share in list(self._shares):
                    if share in self._shares and (share.leaves or self._chain.config.standby):
                        await self._warm(share, all_of_it=is_quiet)
                await self._move()
            except SwarmError as failure:  # whoever takes the next step will be told if it still matters
                log.info("%s", failure)
            for share in [each for each in self._spares if each not in self._shares]:
                await self._spares.pop(share).disconnect()

    async def _repair(self) -> None:
        """Replace those that have failed while no step runs."""
        if not self._busy.locked() and any(share.error is not None for share in self._shares):
            async with self._busy:
                await self._reach(self._is_whole)

    async def _look_around(self) -> None:
        """Now and then, see for one of the servers whether leaving it for faster ones pays, the replay included."""
        num_tokens = self._tokens.num_tokens
        if not self._shares or num_tokens < self._looked_at + LOOK_TOKENS:
            self._looked_at = min(self._looked_at, num_tokens)
            return
        self._looked_at = num_tokens
        share = self._shares[num_tokens // LOOK_TOKENS % len(self._shares)]
        if share.leaves or share.error is not None:
            return
        with contextlib.suppress(MissingBlocks):  # then there is no choice
            better = await self._route({holding(share.hop.server)}, share)
            if share not in self._shares:
                return
            before, after = self._neighbours(share)
            present = self._chain.price((share.hop,), needs=self._needs(share.hop.span), before=before, after=after)
            share.leaves |= pays_to_move(
                step_seconds=present.seconds,
                better_step_seconds=better.seconds,
                replay_seconds=replay_seconds(better.hops, self.batch_size * num_tokens),
                num_steps_left=min(num_tokens, self.max_length - num_tokens),  # as many as it has had, perhaps
            )
            if share.leaves:
                log.info("%s takes %.3g s a step; elsewhere, %.3g s", share.peer, present.seconds, better.seconds)

    async def _warm(self, share: Share, *, all_of_it: bool) -> None:
        """Have a spare server for a share, and let it compute what it lacks of what that has answered."""
        lane = self._spares.get(share)
        if lane is not None and (failed := lane.next_failure()) is not None:
            assert failed.error is not None
            self._chain.blame(failed.error)
            await self._spares.pop(share).disconnect()
            lane = None
        if lane is None:
            if now() < self._no_spare_until.get(share, 0.0):
                return
            self._no_spare_until[share] = now() + TEND_SECONDS
            route = await self._route({holding(share.hop.server)}, share)
            lane = self._lane_on(route.hops, share.history, self._chores.set)
            self._spares[share] = lane
        if not lane.is_open:
            await lane.open()
        lane.settle()
        lag = share.num_computed - min(each.num_requested for each in lane.shares)
        if lag >= FEED_TOKENS or all_of_it or share.leaves:
            await lane.ask(share.num_computed, at_once=None if share.leaves else SPARE_TOKENS)

    async def _move(self) -> None:
        """Leave the servers that are going away, while no step runs, as soon as others are warm."""
        for share, spare in list(self._spares.items()):
            lag = share.num_computed - min(each.num_computed for each in spare.shares)
            if not (share.leaves and spare.is_open and lag <= FEED_TOKENS):
                continue
            async with self._busy:
                if self._lane is not None and share in self._lane.shares and share.error is None:
                    log.info("%s takes over from %s", ", ".join(each.peer for each in spare.shares), share.peer)
                    self._promote(self._lane, share, spare)
                    await share.disconnect()

    async def close(self) -> None:
        """Let the servers forget it. May be called twice."""
        self._closed = True
        for task in (self._step, self._tending):
            if task is not None:
                task.cancel()
        async with self._busy:
            for lane in (self._lane, *self._spares.values()):
                if lane is not None:
                    await lane.disconnect()
