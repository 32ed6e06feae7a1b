"""The way through the swarm: which servers, in which order, and what happens when one fails.

`persist` is the only retry loop of the client. What it retries keeps its place: a walk that failed at block 8 goes on
at block 8, by another server.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from shoal.client.clock import now
from shoal.client.config import ClientConfig
from shoal.client.connection import Connection
from shoal.client.pairs import BrokenPairs
from shoal.client.picture import Picture
from shoal.client.store import Store
from shoal.client.suspects import Suspects
from shoal.errors import Misrouted, MissingBlocks, PeerError, ServerBusy, ServerLost
from shoal.net.encodings import as_received
from shoal.net.transport import ModelInfo, Node
from shoal.protocol import MAX_STEP_TOKENS, Backward, Forward, TensorName
from shoal.routing.latency import RoundTrips
from shoal.routing.route import SLOWEST, Hop, Needs, Route, announced_seconds, choose_route, price_route
from shoal.routing.spread import UnderWay
from shoal.routing.view import SwarmView, format_blocks
from shoal.spans import ServerInfo, Span

log = logging.getLogger(__name__)
T = TypeVar("T")

PASSES_AT_ONCE = 8
"""Microbatches under way together: enough to keep a chain of servers busy, and few enough for their limits."""


@dataclass(frozen=True)
class Piece:
    """The inputs [B, T, D] of a span, as they were sent to one server: what its gradient is computed from."""

    span: Span
    hidden: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None

    def tensors(self) -> dict[TensorName, torch.Tensor]:
        return named_tensors(self.hidden, self.positions, self.mask)


Holding = tuple[str, Span, bool]
"""A peer and what it announces to hold, blocks and head: started again with others, it is another server."""


def holding(server: ServerInfo) -> Holding:
    return server.peer, server.span, server.head


def named_tensors(
    hidden: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
) -> dict[TensorName, torch.Tensor]:
    """The tensors of a message, without those that are absent."""
    tensors: dict[TensorName, torch.Tensor] = {"hidden": hidden}
    if positions is not None:
        tensors["positions"] = positions
    if mask is not None:
        tensors["mask"] = mask
    return tensors


class Chain:
    """One model in the swarm, as one client sees it."""

    def __init__(self, node: Node, model: ModelInfo, fingerprint: str, config: ClientConfig) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.config = config
        self.store = Store(config.kept, memory_bytes=config.history_memory, folder=config.history_folder)
        """Where the histories of all sessions are."""
        self.broken_pairs = BrokenPairs(now)
        self.round_trips = RoundTrips(now)
        self._node = node
        self._picture = Picture(node, model, fingerprint, config, self.round_trips)
        self._suspects = Suspects(clock=now)
        self._under_way = UnderWay()
        self._head_found = True
        self._passes = asyncio.Semaphore(PASSES_AT_ONCE)

    # -- routes -------------------------------------------------------------------------------------------------------

    async def route(
        self,
        span: Span,
        excluded: Set[Holding] = frozenset(),
        *,
        needs: Needs,
        before: ServerInfo | None = None,
        after: ServerInfo | None = None,
    ) -> Route:
        """The fastest chain of usable servers over a span, which may be a part of a ring, between two other servers.

        A head that is needed is found if anybody offers one.

        Raises `MissingBlocks`, and `SwarmError` if the directory has never answered.
        """
        await self._picture.keep_fresh()
        view = self._trusted(excluded)
        if view.missing(span):
            await self._picture.refresh()
            view = self._trusted(excluded)
        if view.missing(span):  # better a server that failed lately than none
            view = self._askable(excluded)
        route = choose_route(
            view,
            span,
            needs=replace(needs, head=needs.head and self._has_head(view)),
            known=self.round_trips.picture(apart=self.broken_pairs.now(), under_way=self._under_way.seconds),
            before=before,
            after=after,
            chooser=self.config.chooser,
            seed=random.getrandbits(32),
        )
        log.info("blocks %s: %s", span, route.explain())
        return route

    def _has_head(self, view: SwarmView) -> bool:
        """Whether a server offers the output head; the log tells when that changes."""
        (last,) = view.holders(Span(view.num_blocks - 1, view.num_blocks))
        found = any(server.head for server in last)
        if found != self._head_found:
            self._head_found = found
            log.log(
                logging.INFO if found else logging.WARNING,
                "the output head is computed %s",
                "by servers" if found else "here: no server offers it now",
            )
        return found

    def _askable(self, excluded: Set[Holding]) -> SwarmView:
        """Of those that are usable, those who may be asked now."""
        return self._picture.usable().only(
            lambda each: holding(each) not in excluded and not self._suspects.barred(each.peer)
        )

    def _trusted(self, excluded: Set[Holding]) -> SwarmView:
        """Of these, those that have not failed lately."""
        return self._askable(excluded).only(lambda server: not self._suspects.avoided(server.peer))

    async def persist(self, span: Span, act: Callable[[Set[Holding]], Awaitable[T]]) -> T:
        """Do `act` until it succeeds, each time avoiding the servers that have failed.

        It is given the servers that, as they are now, cannot do this. Raises `MissingBlocks` at once if nobody serves
        some blocks of the span, and after the client's patience if those who do keep failing or have no room.
        """
        give_up_at: float | None = None
        excluded: set[Holding] = set()
        while True:
            began = now()
            try:
                return await act(excluded)
            except ServerLost as lost:
                log.warning("%s; looking for another server", lost)
                self.blame(lost, since=began)
            except ServerBusy as busy:
                log.info("%s", busy)
                self.blame(busy)
            except Misrouted as misrouted:
                log.info("%s", misrouted)
                self.blame(misrouted)
                excluded.update(holding(each) for each in self._picture.known().servers if each.peer == misrouted.peer)
                self._picture.expire()  # it may hold other blocks by now
            except MissingBlocks:
                if self._picture.out_of_touch is None:
                    if missing := self._picture.usable().missing(span):
                        raise self._picture.missing(missing) from None
                    if self._picture.usable().only(lambda server: holding(server) not in excluded).missing(span):
                        raise self._exhausted(span, excluded) from None
                wait = self._suspects.seconds_left() or 1.0
                give_up_at = give_up_at or now() + self.config.patience_seconds
                if now() + wait > give_up_at:
                    raise self._picture.out_of_touch or self._exhausted(span, excluded) from None
                log.warning("waiting %.1f s for a server that holds blocks %s", wait, span)
                await asyncio.sleep(wait)

    def _exhausted(self, span: Span, excluded: Set[Holding]) -> MissingBlocks:
        unavailable = self._askable(excluded).missing(span)
        return MissingBlocks(
            f"no server for blocks {format_blocks(unavailable)} answers: {'; '.join(self._suspects.reasons())}",
            blocks=unavailable,
        )

    async def connect(self, server: ServerInfo) -> Connection:
        """A new connection to a server. Raises `ServerLost`."""
        measured = functools.partial(self.round_trips.measured, server.peer)
        return await Connection.open(self._node.transport, server, self.config, round_trip=measured)

    def blame(self, error: PeerError, *, since: float | None = None) -> None:
        """A server has failed, in something that began at `since`: it is avoided from now on, as that deserves."""
        match error:
            case ServerBusy():
                self._suspects.busy(error.peer, error.retry_after, str(error))
            case Misrouted():
                self._suspects.unfit(error.peer, str(error))
            case _:
                self._suspects.lost(error.peer, str(error), since=now() if since is None else since)

    def answered(self, hop: Hop, took: Iterable[tuple[int, float]] = ()) -> None:
        """A server did its work: whatever was held against it is forgotten.

        What so many tokens `took` it, in seconds, corrects what it announces.
        """
        self._suspects.forgive(hop.server.peer)
        for num_tokens, seconds in took:
            announced = announced_seconds(hop.server, len(hop.span), num_tokens)
            self.round_trips.measured_step(hop.server.peer, announced, seconds)

    def price(
        self, hops: Sequence[Hop], *, needs: Needs, before: ServerInfo | None = None, after: ServerInfo | None = None
    ) -> Route:
        """What a step costs on a chain that stands, where a session is open already."""
        known = self.round_trips.picture(apart=self.broken_pairs.now(), under_way=self._under_way.seconds)
        return price_route(hops, needs=replace(needs, needed_tokens=0), known=known, before=before, after=after)

    # -- single passes ------------------------------------------------------------------------------------------------

    async def forward(
        self, span: Span, hidden: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[list[Piece]]]:
        """The outputs [B, T, D] of a span and, for each microbatch, the pieces that `backward` needs.

        Rows are independent of one another, so that microbatches go through the swarm at the same time.
        """
        hidden = as_received(hidden, self.config.wire)
        rows = max(1, MAX_STEP_TOKENS // hidden.shape[1])
        batches = [
            Piece(span, part, _rows(positions, start, rows), _rows(mask, start, rows))
            for start, part in zip(range(0, hidden.shape[0], rows), hidden.split(rows), strict=True)
        ]
        results = await self._together(self._forward(batch) for batch in batches)
        return _joined([output for output, _ in results]), [pieces for _, pieces in results]

    async def backward(self, batches: Sequence[Sequence[Piece]], grad: torch.Tensor) -> torch.Tensor:
        """The gradient [B, T, D] of what went into `forward`, from that of what came out."""
        grads = as_received(grad, self.config.wire).split([pieces[0].hidden.shape[0] for pieces in batches])
        return _joined(await self._together(self._backward(list(p), g) for p, g in zip(batches, grads, strict=True)))

    async def _together(self, works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of all, some at a time. The first error ends the others and is raised."""

        async def in_turn(work: Coroutine[Any, Any, T]) -> T:
            try:
                async with self._passes:
                    return await work
            finally:
                work.close()  # if its turn never came

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(in_turn(work)) for work in works]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _forward(self, whole: Piece) -> tuple[torch.Tensor, list[Piece]]:
        hidden, pieces, end = whole.hidden, list[Piece](), whole.span.end

        async def walk(excluded: Set[Holding]) -> torch.Tensor:
            nonlocal hidden
            start = pieces[-1].span.end if pieces else whole.span.start
            if start == end:
                return hidden
            route = await self.route(Span(start, end), excluded, needs=_single_pass(hidden))
            with self._using(route):
                for hop in route.hops:
                    piece = Piece(hop.span, hidden, whole.positions, whole.mask)
                    hidden = await self._call(hop, Forward, piece.tensors(), answer="hidden")
                    pieces.append(piece)
            return hidden

        return await self.persist(whole.span, walk), pieces

    async def _backward(self, pieces: list[Piece], grad: torch.Tensor) -> torch.Tensor:
        whole = Span(pieces[0].span.start, pieces[-1].span.end)

        async def walk_back(excluded: Set[Holding]) -> torch.Tensor:
            nonlocal grad
            while pieces:
                piece = pieces[-1]
                route = await self.route(piece.span, excluded, needs=_single_pass(grad))
                if len(route.hops) > 1:  # its server is gone and several take its place: find out what goes into each
                    _, finer = await self._forward(piece)
                    pieces[-1:] = finer
                    continue
                tensors = {**piece.tensors(), "grad": grad}
                with self._using(route):
                    grad = await self._call(route.hops[0], Backward, tensors, answer="grad")
                pieces.pop()
            return grad

        return await self.persist(whole, walk_back)

    @contextlib.contextmanager
    def _using(self, route: Route) -> Iterator[None]:
        """Other passes see that this one is on its way, and take other servers where that is faster."""
        self._under_way = self._under_way.with_(route)
        try:
            yield
        finally:
            self._under_way = self._under_way.without(route)

    async def _call(
        self,
        hop: Hop,
        kind: type[Forward | Backward],
        tensors: dict[TensorName, torch.Tensor],
        *,
        answer: TensorName,
    ) -> torch.Tensor:
        connection = await self.connect(hop.server)
        try:
            request = kind(model=self.model.key, fingerprint=self.fingerprint, start=hop.span.start, end=hop.span.end)
            hidden = tensors["hidden"]
            usual = hidden.shape[0] * hidden.shape[1] / max(hop.server.prefill_speed, SLOWEST)
            result = await connection.compute(request, tensors, answer=answer, usual_seconds=usual)
            self.answered(hop)
            return result
        finally:
            await connection.close()


def _single_pass(hidden_BTD: torch.Tensor) -> Needs:
    """What a route is needed for: one answer of each server to the client, which leaves nothing there."""
    batch_size, num_tokens, _ = hidden_BTD.shape
    return Needs(step_tokens=batch_size * num_tokens, ring=False, dtype=str(hidden_BTD.dtype).removeprefix("torch."))


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))


def _rows(tensor: torch.Tensor | None, start: int, count: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[start : start + count]
