"""What is done for a session while nobody waits for it.

Servers that fail between two steps are replaced before the next, others are kept warm to take the places of those that
fail or go away, and servers are left where others are faster. The session itself owns the one procedure that mends a
ring; here is decided when it is needed, and what spare servers are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from shoal.client.chain import Chain, holding
from shoal.client.clock import now
from shoal.client.lane import Lane
from shoal.client.routes import Routes
from shoal.client.share import Share
from shoal.client.tokens import Tokens
from shoal.errors import MissingBlocks, SwarmError
from shoal.routing.moving import pays_to_move, replay_seconds

log = logging.getLogger(__name__)

FEED_TOKENS = 32
"""A spare server is given what it lacks when that is so much: a pass for so many costs hardly more than for one."""
SPARE_TOKENS = 128
"""At most so much at once: whoever decodes on that server waits for a pass at most."""
TEND_SECONDS = 10.0
"""How long after no spare server could be found one is looked for again."""

LOOK_TOKENS = 32
"""So often it is considered whether others would be faster."""


class Tending:
    """The spare servers of a session's `lane`, and the task that looks after both. It has to be stopped.

    Whoever changes the lane holds `busy`; `mend` replaces, under it, those that have failed.
    """

    def __init__(
        self,
        chain: Chain,
        tokens: Tokens,
        routes: Routes,
        lane: Lane,
        *,
        busy: asyncio.Lock,
        mend: Callable[[], Awaitable[None]],
    ) -> None:
        self.lane = lane
        self.spares: dict[Share, Lane] = {}
        """By whom they can replace."""
        self._chain = chain
        self._tokens = tokens
        self._routes = routes
        self._busy = busy
        self._mend = mend
        self._chores = asyncio.Event()
        self._no_spare_until: WeakKeyDictionary[Share, float] = WeakKeyDictionary()
        self._looked_at = 0
        self._task = asyncio.create_task(self._tend())

    def wake(self) -> None:
        """There may be something to do."""
        self._chores.set()

    def stop(self) -> None:
        """Look after nothing any more. The spare servers are still to be disconnected."""
        self._task.cancel()

    def promote(self, share: Share) -> bool:
        """Let the spare server of another take its place, if there is one that can: returns whether there is.

        What it knew that had not been answered, it has to say again.
        """
        spare = self.spares.get(share)
        if spare is None or not spare.is_open or any(each.error is not None for each in spare.shares):
            return False
        log.info("%s takes the place of %s", ", ".join(each.peer for each in spare.shares), share.peer)
        del self.spares[share]
        for each in spare.shares:
            each.news = self.lane.news
        sink = self.lane.sink(self.lane.shares.index(share))
        if spare.shares[-1].num_computed > sink.num_tokens:
            spare.shares[-1].uncomputed_from(sink.num_tokens)
            self._tokens.epoch += 1
        if sink is self.lane.outputs:
            self.lane.outputs.logits.clear()
        self.lane.replace(share, spare.shares)
        return True

    # -- the chores ---------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
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
                for share in list(self.lane.shares):
                    if share in self.lane.shares and (share.leaves or self._chain.config.standby):
                        await self._warm(share, all_of_it=is_quiet)
                await self._move()
            except SwarmError as failure:  # whoever takes the next step will be told if it still matters
                log.info("%s", failure)
            for share in [each for each in self.spares if each not in self.lane.shares]:
                await self.spares.pop(share).disconnect()

    async def _repair(self) -> None:
        """Replace those that have failed while no step runs."""
        if not self._busy.locked() and any(share.error is not None for share in self.lane.shares):
            async with self._busy:
                await self._mend()

    async def _look_around(self) -> None:
        """Now and then, see for one of the servers whether leaving it for faster ones pays, the replay included."""
        num_tokens = self._tokens.num_tokens
        if num_tokens < self._looked_at + LOOK_TOKENS:
            self._looked_at = min(self._looked_at, num_tokens)
            return
        self._looked_at = num_tokens
        share = self.lane.shares[num_tokens // LOOK_TOKENS % len(self.lane.shares)]
        if share.leaves or share.error is not None:
            return
        with contextlib.suppress(MissingBlocks):  # then there is no choice
            better = await self._routes.instead_of(share, self.lane, {holding(share.hop.server)})
            if share not in self.lane.shares:
                return
            present = self._routes.price(share, self.lane)
            share.leaves |= pays_to_move(
                step_seconds=present.seconds,
                better_step_seconds=better.seconds,
                replay_seconds=replay_seconds(better.hops, self._routes.batch_size * num_tokens),
                # as many as it has had, perhaps
                num_steps_left=min(num_tokens, self._routes.num_steps_left),
            )
            if share.leaves:
                log.info("%s takes %.3g s a step; elsewhere, %.3g s", share.peer, present.seconds, better.seconds)

    async def _warm(self, share: Share, *, all_of_it: bool) -> None:
        """Have a spare server for a share, and let it compute what it lacks of what that has answered."""
        spare = self.spares.get(share)
        if spare is not None and (failed := spare.next_failure()) is not None:
            assert failed.error is not None
            self._chain.blame(failed.error)
            await self.spares.pop(share).disconnect()
            spare = None
        if spare is None:
            if now() < self._no_spare_until.get(share, 0.0):
                return
            self._no_spare_until[share] = now() + TEND_SECONDS
            route = await self._routes.instead_of(share, self.lane, {holding(share.hop.server)})
            spare = self._routes.lane(route, share.history, self.wake)
            self.spares[share] = spare
        if not spare.is_open:
            await spare.open()
        spare.settle()
        lag = share.num_computed - min(each.num_requested for each in spare.shares)
        if lag >= FEED_TOKENS or all_of_it or share.leaves:
            await spare.ask(share.num_computed, at_once=None if share.leaves else SPARE_TOKENS)

    async def _move(self) -> None:
        """Leave the servers that are going away, while no step runs, as soon as others are warm."""
        for share, spare in list(self.spares.items()):
            lag = share.num_computed - min(each.num_computed for each in spare.shares)
            if not (share.leaves and spare.is_open and lag <= FEED_TOKENS):
                continue
            async with self._busy:
                if share in self.lane.shares and share.error is None and self.promote(share):
                    await share.disconnect()
