"""The blocks of a server through its life: it takes a span, serves it, and goes to another when the swarm needs that.

`SpanKeeper` is the one writer of the server's `SpanState`. What it holds for clients is a `LoadedSpan`. Where there is
room, the next one is made from it and served while the clients of the first one go over. Otherwise it is forgotten
before other blocks are loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeAlias

from shoal.concurrency import background, first_of, owned_task
from shoal.errors import ShoalError, SwarmError
from shoal.events import BlocksChanged
from shoal.peers import ServerInfo
from shoal.policy.claims import at, without_span
from shoal.policy.placement.joining import Placed
from shoal.policy.placement.mover import Mover
from shoal.policy.placement.plan import Move
from shoal.policy.view import format_blocks
from shoal.server.announcer import Announcer
from shoal.server.engine.engine import Engine
from shoal.server.engine.idle_timing import time_when_idle
from shoal.server.neighbors import NeighborMonitor
from shoal.server.placing.choosing import SpanChooser
from shoal.server.placing.description import describe
from shoal.server.placing.loaded_span import LoadedSpan, collect_memory, extend_span, load_span
from shoal.server.placing.move_finder import MoveFinder, OwnBlocks
from shoal.server.placing.setup import Surroundings, base_info
from shoal.server.placing.span_state import SpanPhase, SpanState
from shoal.server.placing.swarm_watch import SwarmWatch
from shoal.server.refusals import Refused, leaving, moving
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.reception import Reception
from shoal.server.rpc.streams import Handler
from shoal.server.startup_progress import Phase, Progress
from shoal.spans import Span

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0
"""How long a claim is announced before the server looks whether others want the same: records need that to spread."""
MAX_CLAIMS = 8
"""How often a server that joins claims other blocks because others want the same. Two rounds are usual."""
HOLE_DRAIN_SECONDS = 1.0
"""How long sessions have to go on elsewhere if the server moves to blocks that no server holds. It is short, because
sessions that need those blocks cannot go on before, and would be waited for in vain. Clients can rebuild all of them.
"""
Loading: TypeAlias = Coroutine[Any, Any, LoadedSpan]
LOAD_FAILURES = (ShoalError, OSError, MemoryError, RuntimeError, Refused)
"""What loading may raise when memory, the disk or the hub fails. PyTorch raises `RuntimeError` for lack of memory."""


class SpanKeeper:
    """Chooses, loads and serves blocks, one span at a time, until it is stopped (`live`).

    `online` is set when it answers clients for the first time. `announcer` tells the swarm what it is doing.
    """

    def __init__(self, around: Surroundings) -> None:
        self.state = SpanState()
        self.online = asyncio.Event()
        self._around = around
        self._loaded: LoadedSpan | None = None
        self._told: Span | None = None  # the observers know that it has these blocks
        self._mover = Mover(around.node.transport.peer, around.setup.model.num_blocks)
        self._drain_seconds = 0.0  # that clients get before the server moves
        self._is_open = asyncio.Event()  # the span that was loaded last is served
        self._stopping = asyncio.Event()
        node, model, every_seconds = around.node, around.setup.model, around.config.announce_seconds
        base = base_info(around.config, around.node, around.setup)
        self.announcer = Announcer(node, model, base, every_seconds=every_seconds)
        self.announcer.describe_by(self.describe)
        self._reception = Reception(idle_seconds=around.config.idle_seconds)
        self._pushes = PushService(node.transport)
        self._watch = SwarmWatch(node, around.setup)
        self._chooser = SpanChooser(around, base, self._watch)
        self._neighbors = NeighborMonitor(
            node,
            model,
            self.describe,
            every_seconds=every_seconds,
            on_new=self.announcer.announce_soon,
            on_view=self._watch.take,
        )

    @property
    def engine(self) -> Engine:
        """What computes the blocks. Raises `SwarmError` while the server holds none."""
        if self._loaded is None:
            raise SwarmError("this server holds no blocks at the moment")
        return self._loaded.engine

    def describe(self) -> ServerInfo:
        """The server as it is at this moment, whether or not others can reach it."""
        if self._loaded is not None:
            self._around.portrait.speeds = self._loaded.engine.speeds or self._loaded.speeds
        info = describe(
            self._chooser.base,
            self.state,
            self._loaded,
            speeds=self._around.portrait.speeds,
            is_resting=self.state.is_resting(now=self._around.clock()),
            addresses=self._around.node.transport.addresses,
            round_trips=self._neighbors.round_trips,
            unreached=self._neighbors.unreached,
        )
        return self._around.portrait.complete(info)

    # -- its life -----------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Take blocks and serve them, and others when the swarm needs those more, until `stop` is called.

        Raises what loading raises if the server cannot load the first blocks that it takes.
        """
        config = self._around.config
        self._claim(await self._chooser.first())
        if config.blocks is not None:  # whatever others want
            self._confirm()
        async with self.announcer.announcing(), self._pushes.running():
            if config.blocks is None:
                await self._settle_claim()
            async with (
                self._neighbors.measuring(),
                self._measuring_network(),
                self._watch.running() if config.moves else contextlib.nullcontext(),
            ):
                await self._load_and_serve()
                while not self._stopping.is_set():
                    if self.state.phase is SpanPhase.CHOOSING:
                        await self._announce_claim(await self._chooser.again(self._avoids))
                        await self._settle_claim()
                    await self._load_and_serve()

    def _measuring_network(self) -> contextlib.AbstractAsyncContextManager[None]:
        around = self._around
        return around.portrait.measuring(
            around.setup,
            self._neighbors,
            is_ready=lambda: self.state.phase is SpanPhase.SERVING,
            on_change=self.announcer.announce_soon,
        )

    async def stop(self, living: asyncio.Task[None]) -> None:
        """Let the server leave the swarm: `living`, the task of `live`, ends with that.

        Its clients get the configured time to go on elsewhere. A server that answers none leaves at once.
        """
        self._stopping.set()
        if not self.state.answers:
            living.cancel()
        await asyncio.wait([living])
        self.state = self.state.leaving()
        self._tell(None, "it leaves the swarm")

    # -- choosing, without blocks -------------------------------------------------------------------------------------

    def _avoids(self, span: Span) -> bool:
        return self.state.avoids(span, now=self._around.clock())

    def _claim(self, placed: Placed) -> None:
        self.state = self.state.claimed(placed)
        log.info("the server claims blocks %s: %s", placed.span, placed.reason)

    async def _settle_claim(self) -> None:
        """Make the announced claim final, or claim what others leave that want the same blocks, and then that."""
        for _ in range(MAX_CLAIMS):
            await asyncio.sleep(CLAIM_SECONDS)
            try:
                placed = await self._chooser.settle(self.describe())
            except SwarmError as failure:
                log.info("the server cannot see whether others want its blocks: %s", failure)
                break
            assert self.state.wanted is not None
            if placed.span == self.state.wanted.span:
                break
            await self._announce_claim(placed)
        self._confirm()
        await self.announcer.announce_now()

    def _confirm(self, *, kept: Span | None = None) -> None:
        """Nothing is in the way of what is claimed: load it, beside what is `kept`."""
        now, wanted, held = self._around.clock(), self.state.wanted, self.state.held
        assert wanted is not None
        seconds = self._drain_seconds if kept is None else 0.0
        own = without_span(self.describe(), now=now) if held is None else at(self.describe(), held.span, now=now)
        ready_at = now + seconds + own.seconds_to_load(wanted.span)
        self.state = self.state.confirmed(ready_at=ready_at, extends=kept is not None)

    # -- serving ------------------------------------------------------------------------------------------------------

    async def _load_and_serve(self) -> None:
        """Load the wanted blocks, serve them until others are wanted that have to be loaded in their place.

        If they cannot be loaded, the state says what follows. The first load raises instead.
        """
        around = self._around
        wanted = self.state.wanted
        assert wanted is not None
        loading = load_span(
            around.config,
            around.setup,
            wanted.span,
            around.compute,
            around.observers,
            around.report,
            around.portrait.profile,
        )
        loaded = await self._loaded_by(loading, is_first=not self.online.is_set())
        if loaded is None:
            await collect_memory(around.compute.executor, around.setup.device, _nothing)
        try:
            async with asyncio.TaskGroup() as spans:
                while loaded is not None:
                    following: asyncio.Future[LoadedSpan | None] = asyncio.get_running_loop().create_future()
                    spans.create_task(self._serve(loaded, following), name=f"shoal-blocks-{loaded.span}")
                    del loaded  # only the task has it, and can free its memory
                    loaded = await following
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        if not self._stopping.is_set():
            await self.announcer.announce_now()

    async def _loaded_by(
        self, loading: Coroutine[Any, Any, LoadedSpan], *, is_first: bool = False
    ) -> LoadedSpan | None:
        """What was loaded; `None` if that fails. Then the state says what follows. The first load raises instead."""
        around, wanted = self._around, self.state.wanted
        assert wanted is not None
        began = asyncio.get_running_loop().time()
        try:
            loaded = await loading
        except LOAD_FAILURES as failure:
            if is_first:
                raise
            log.warning("the server could not load blocks %s: %s", wanted.span, failure)
            self.state = self.state.failed(str(failure) or type(failure).__name__, now=around.clock())
            self._mover = self._mover.failed(now=around.clock())
            return None
        seconds = asyncio.get_running_loop().time() - began
        log.log(logging.INFO if is_first else logging.WARNING, "loading blocks %s took %.1f s", wanted.span, seconds)
        await around.portrait.add_capacity(around.setup, loaded.weights.body, loaded.profile, around.compute.executor)
        return loaded

    async def _serve(self, loaded: LoadedSpan, following: asyncio.Future[LoadedSpan | None]) -> None:
        """Serve a span as `_answer` does, and free its memory."""
        around, remains = self._around, loaded.remains
        answering = self._answer(loaded, following)
        del loaded
        try:
            await answering
        finally:
            if not following.done():
                following.set_result(None)
        del answering, following
        if not self._stopping.is_set():
            await collect_memory(around.compute.executor, around.setup.device, remains)

    async def _answer(self, loaded: LoadedSpan, following: asyncio.Future[LoadedSpan | None]) -> None:
        """Answer clients until other blocks are wanted, or the server is stopped. Then let the clients go.

        The result of `following` is the next span if it is served from now on; otherwise it has to be loaded.
        """
        idle_seconds, weights = self._around.config.idle_seconds, self._around.weights
        handler = Handler(loaded.engine, self._pushes, idle_seconds=idle_seconds, weights=weights)
        timing = time_when_idle(loaded.engine, self._around.node.transport.peer)
        async with loaded.engine.running(), background(timing, name="shoal-idle-timing"):
            try:
                await self._open(loaded, handler)
                await first_of(_until(self._stopping), self._until_it_moves(loaded, following))
                await self._drain(handler)
            finally:
                await self._close(loaded, handler)

    async def _open(self, loaded: LoadedSpan, handler: Handler) -> None:
        """From now on, clients are answered."""
        around, is_first = self._around, not self.online.is_set()
        self._loaded = loaded
        self._reception.handler, around.compute.is_serving = handler, True
        self.state = self.state.loaded()
        around.report(Progress(Phase.ANNOUNCING))
        if is_first:
            await around.node.transport.listen(self._reception)
        else:
            self._mover = self._mover.arrived(now=around.clock())
            log.warning("the server now serves blocks %s: %s", loaded.span, self.state.reason)
        await self.announcer.announce_now()
        self._tell(loaded.span, self.state.reason)
        self.online.set()
        self._is_open.set()

    async def _until_it_moves(self, loaded: LoadedSpan, following: asyncio.Future[LoadedSpan | None]) -> None:
        """Return when other blocks are claimed for good, and have to be loaded, or when they are served already.

        In the second case they are the result of `following`. Never returns if the server may not move.
        """
        around, held = self._around, loaded.span
        if not around.config.moves:
            await _forever()
        while True:
            own = OwnBlocks(held, self.describe, self._announce_claim, self._unclaim)
            move = await self._next_move(own)
            kept = own.kept_for(move.after, around.clock())
            self._drain_seconds = around.config.drain_seconds
            if move.fills and kept is None:
                self._drain_seconds = min(HOLE_DRAIN_SECONDS, self._drain_seconds)
            log.warning("the server goes from blocks %s to %s: %s", held, move.after, move.reason)
            self._confirm(kept=kept)
            await self.announcer.announce_now()
            if kept is None:
                return
            loading = extend_span(around.config, around.setup, loaded, move.after, around.compute, around.observers)
            extended = await self._loaded_by(loading)
            if extended is not None and (alone := await self._watch.uncovered(held, kept, now=around.clock())):
                log.warning("the server stays with %s: no other server has %s now", held, format_blocks(alone))
                self._mover = self._mover.failed(now=around.clock())
                self.state = self.state.unclaimed()
            elif extended is not None:
                self._is_open.clear()
                following.set_result(extended)
                await self._is_open.wait()
                return
            extended = None
            await self.announcer.announce_now()

    async def _next_move(self, own: OwnBlocks) -> Move:
        """Wait for the next move of this server, whose blocks are claimed then."""
        finder = MoveFinder(own, self._watch, self._mover, clock=self._around.clock)
        try:
            move = await finder.find()
        except Exception:  # a defect of ours: the server goes on where it is
            log.exception("the server cannot plan moves any more")
            if self.state.phase is SpanPhase.CLAIMING:
                await self._unclaim()
            await _forever()
        self._mover = finder.mover
        return move

    async def _announce_claim(self, placed: Placed) -> bool:
        self._claim(placed)
        return await self.announcer.announce_now()

    async def _unclaim(self) -> None:
        self.state = self.state.unclaimed()
        await self.announcer.announce_now()

    async def _drain(self, handler: Handler) -> None:
        """Let clients go on elsewhere, before the server moves or because it is stopped, which it may be meanwhile."""
        seconds = self._drain_seconds
        if self._stopping.is_set():
            await self.announcer.leave()  # first, because clients that are told look for other servers at once
            seconds = self._around.config.drain_seconds
        if not seconds:
            return
        draining = handler.drain(seconds, farewell=self._farewell.failure)
        async with owned_task(draining) as drained, owned_task(_until(self._stopping)) as stopped:
            await asyncio.wait({drained, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                await self.announcer.leave()
            await drained

    async def _close(self, loaded: LoadedSpan, handler: Handler) -> None:
        """From now on, no client is answered with these blocks; those that are left are told so."""
        is_present = self._loaded is loaded
        frees = is_present and self.state.phase is SpanPhase.DRAINING and not self._stopping.is_set()
        if frees:
            self._reception.handler, self._around.compute.is_serving = None, False
        await handler.leave(self._farewell.failure)
        if frees:
            self.state = self.state.drained()
        if is_present:
            self._loaded = None

    def _tell(self, now: Span | None, reason: str) -> None:
        """Tell the observers which blocks the server has now."""
        before, self._told = self._told, now
        if now != before:
            self._around.observers.emit(BlocksChanged(before, now, reason))

    @property
    def _farewell(self) -> Refused:
        return leaving() if self._stopping.is_set() else moving()


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _forever() -> NoReturn:
    while True:
        await asyncio.Event().wait()


def _nothing() -> list[str]:
    return []
