"""Single passes through the swarm, forward and backward: what training makes, and any call without a cache.

A batch is cut into microbatches. They travel at the same time, each over the servers on which it will be ready first.
For each server on its route, a microbatch keeps its inputs there on the client: if that server is gone when the
gradient comes back, another server computes the blocks again from these inputs. If it is late, other servers compute
them beside it, and the first answer counts.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from shoal.client.swarm.answers import joined
from shoal.client.swarm.known.directory_cache import Holding
from shoal.client.swarm.message_sizes import check_length, check_size
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.gradients import FactorSums, Gradients, PieceGradients
from shoal.client.training.late_passes import LatePasses
from shoal.client.training.pass_audits import PassAudits
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan, pass_needs
from shoal.client.training.server_passes import ServerPasses
from shoal.client.training.sum_ledger import ServerSum, SumLedger, SummedPass
from shoal.concurrency import now
from shoal.errors import PeerError
from shoal.model.peft.factors import FactorGradients
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import Hop, Needs, Route
from shoal.policy.routing.spread import microbatch_rows
from shoal.spans import Span

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_MICROBATCHES_IN_FLIGHT = 16
"""Microbatches in flight together: enough to keep a route's servers busy, and few enough for their limits."""
NOBODY = frozenset[str]()


class RemotePasses:
    """Forward and backward passes of one client. Its connections are open as long as it is (`async with`)."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._servers = ServerPasses(swarm)
        self._audited = PassAudits(swarm, self._servers)
        self._late = LatePasses(swarm)
        self._in_flight = asyncio.Semaphore(MAX_MICROBATCHES_IN_FLIGHT)

    async def __aenter__(self) -> Self:
        await self._servers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._servers.__aexit__(kind, error, trace)

    async def forward(
        self, plan: PassPlan, hidden_BTD: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[list[MicrobatchPiece]]]:
        """The outputs [B, T, D] of a span and, for each microbatch, the pieces that `backward` needs.

        Raises `SwarmError`s, and `UserError` for a sequence that is too long, alone or with the gradient that is
        wanted.
        """
        hidden_BTD = as_received(hidden_BTD, self._swarm.config.wire)
        batch_size, num_tokens, _ = hidden_BTD.shape
        check_length(num_tokens)
        num_servers = await self._swarm.servers.num_servers(plan.span)
        rows = microbatch_rows(batch_size, num_tokens, num_servers=num_servers)
        microbatches = plan.microbatches(hidden_BTD, positions, mask, rows=rows)
        if plan.wanted_from is not None:  # a server that replaces a lost one on the way back is sent all of this
            check_size({**microbatches[0].tensors(), "grad": microbatches[0].hidden})
        results = await self._all(self._forward(plan, each) for each in microbatches)
        return joined([output for output, _ in results]), [pieces for _, pieces in results]

    async def backward(
        self, plan: PassPlan, microbatches: Sequence[Sequence[MicrobatchPiece]], grad_BTD: torch.Tensor
    ) -> Gradients:
        """The gradients of the inputs and of the factors of `forward`, from those of its outputs.

        Raises `SwarmError`s.
        """
        sizes = [pieces[0].hidden.shape[0] for pieces in microbatches]
        grads = as_received(grad_BTD, self._swarm.config.wire).split(sizes)
        sums, ledger, began = FactorSums(), SumLedger() if len(sizes) > 1 else None, now()

        async def one(number: int, pieces: Sequence[MicrobatchPiece], grad: torch.Tensor) -> torch.Tensor | None:
            found = await self._backward(plan, pieces, grad, number=number, ledger=ledger)
            sums.add(number, found.factors)
            return found.inputs_BTD if plan.inputs_wanted else None

        found = await self._all(
            one(number, pieces, grad) for number, (pieces, grad) in enumerate(zip(microbatches, grads, strict=True))
        )
        if ledger is not None:
            await self._take(plan, ledger, sums, num_microbatches=len(sizes), since=began)
        inputs = [each for each in found if each is not None]
        return Gradients(joined(inputs) if inputs else None, sums.rounded())

    async def norms(self, block: int, paths: Sequence[str], num_rows: int) -> torch.Tensor:
        """The norms of the rows of some linear layers' weights in a block, `num_rows` in all. Raises `SwarmError`s."""
        return await self._norms(Span(block, block + 1), paths, num_rows)

    async def _norms(
        self, span: Span, paths: Sequence[str], num_rows: int, late: frozenset[str] = NOBODY
    ) -> torch.Tensor:
        needs = Needs(session=False)

        async def ask(excluded: Set[Holding]) -> torch.Tensor:
            (hop,) = (await self._route(span, excluded, late, needs)).hops
            asked = self._servers.norms(hop, paths, num_rows)
            race = self._late.race(asked, partial(by_others, hop), late=late)
            found = await race.answer(None)
            found = found if race.others is None else race.others
            assert found is not None  # the server was not pushed anything
            return found

        async def by_others(hop: Hop) -> torch.Tensor:
            avoided = late | {hop.server.peer}
            await self._late.before_others(hop, None, avoided, needs)
            return await self._norms(span, paths, num_rows, avoided)

        return await self._with_failover(span, ask, late)

    # -- sums on servers ----------------------------------------------------------------------------------------------

    async def _take(
        self, plan: PassPlan, ledger: SumLedger, sums: FactorSums, *, num_microbatches: int, since: float
    ) -> None:
        """Take what servers have summed, of passes `since` that time.

        The passes of sums that are lost are computed again, each with its own answer. So are those of sums that are
        late, until one of both is here. Raises `SwarmError`s.
        """

        async def take(of: ServerSum) -> _TakenSum:
            began, is_whole = now(), of.is_whole(num_microbatches=num_microbatches)
            asked = self._servers.take_sum(plan, of, is_whole=is_whole)
            race = self._late.race(asked, partial(by_others, of), late=NOBODY, results_since=since)
            try:
                found = await race.answer(None)
                if found is not None:
                    found = await self._audited.sum(plan, of.hop, of.passes, found)
                return _TakenSum(of, found, race.others)
            except PeerError as failure:
                self._swarm.servers.blame(failure, since=began)
            return _TakenSum(of)

        async def by_others(of: ServerSum) -> Mapping[int, FactorGradients]:
            late = frozenset({of.hop.server.peer})
            await self._late.before_others(of.hop, None, late, pass_needs(of.passes[0].piece.hidden))
            return await self._computed_again(plan, of.passes, late)

        lost: list[SummedPass] = []
        for each in await _together(take(each) for each in ledger.sums):
            if each.by_others is not None:
                sums.join(each.by_others)
            elif each.found is None or self._audited.has_lied(each.peer):  # another audit may have found it since
                lost += each.of.passes
            else:
                sums.join(each.found)
        if lost:
            log.info("sums of gradients are lost: %d passes are computed again", len(lost))
            sums.join(await self._computed_again(plan, lost))

    async def _computed_again(
        self, plan: PassPlan, passes: Sequence[SummedPass], late: frozenset[str] = NOBODY
    ) -> Mapping[int, FactorGradients]:
        """The gradients of factors, by block, of these passes together. Others than the `late` servers compute them."""
        sums = FactorSums()

        async def one(index: int, each: SummedPass) -> None:
            found = await self._backward(plan, [_unsaved(each.piece)], each.grad_BTD, late, number=each.number)
            sums.add(index, found.factors)

        await self._all(one(index, each) for index, each in enumerate(passes))
        return sums.blocks

    # -- one microbatch -----------------------------------------------------------------------------------------------

    async def _forward(
        self, plan: PassPlan, microbatch: MicrobatchPiece, late: frozenset[str] = NOBODY
    ) -> tuple[torch.Tensor, list[MicrobatchPiece]]:
        """The outputs of a microbatch, and the pieces of it that servers computed, in order.

        Others than the `late` servers compute it, if there are any now.
        """
        hidden, pieces, end = microbatch.hidden, list[MicrobatchPiece](), microbatch.span.end

        async def go_on(excluded: Set[Holding]) -> torch.Tensor:
            while (start := pieces[-1].span.end if pieces else microbatch.span.start) < end:
                route = await self._route(Span(start, end), excluded, late, pass_needs(hidden))
                with self._swarm.measurements.reserving(route):
                    await follow(_planned(plan, microbatch, route))
            return hidden

        async def follow(planned: Sequence[MicrobatchPiece]) -> None:
            """Send it over a route, or as far as answers can be used."""
            nonlocal hidden
            while planned:
                ring = self._servers.rings.first_ring(planned)
                planned = planned[len(ring) :]
                async with self._servers.forward_ring(plan, [replace(each, hidden=hidden) for each in ring]) as servers:
                    for each, asked in zip(ring, servers, strict=True):
                        piece = replace(each, hidden=hidden)
                        race = self._late.race(asked, partial(by_others, piece), late=late)
                        computed = await self._audited.forward(plan, piece, race.answer)
                        if race.others is not None:
                            hidden, finer = race.others
                            pieces.extend(finer)
                            return
                        if computed is None:
                            return
                        hidden = computed
                        pieces.append(piece)
                        if self._audited.has_lied(piece.peer):
                            return

        async def by_others(piece: MicrobatchPiece) -> tuple[torch.Tensor, list[MicrobatchPiece]]:
            avoided = await self._before_others(piece, late)
            return await self._forward(plan, replace(piece, hop=None, saved_as=None), avoided)

        return await self._with_failover(microbatch.span, go_on, late), pieces

    async def _backward(
        self,
        plan: PassPlan,
        visited: Sequence[MicrobatchPiece],
        grad: torch.Tensor,
        late: frozenset[str] = NOBODY,
        *,
        number: int,
        ledger: SumLedger | None = None,
    ) -> Gradients:
        """The gradients of a microbatch, whose pieces are visited in reverse as far as gradients are wanted.

        Others than the `late` servers compute them, if there are any now. With a `ledger`, it has those of factors that
        servers keep in sums.
        """
        factors: dict[int, FactorGradients] = {}
        span = Span(visited[0].span.start, visited[-1].span.end)
        pieces = plan.wanted(visited)

        async def go_on(excluded: Set[Holding]) -> torch.Tensor:
            while pieces:
                ring = self._saved_ring(pieces)
                if not ring:
                    piece = pieces[-1] = replace(pieces[-1], saved_as=None)
                    route = await self._route(piece.span, excluded, late, pass_needs(grad))
                    if len(route.hops) > 1:  # several servers replace one: compute the inputs of each of them
                        _, finer = await self._forward(plan, piece, late)
                        pieces[-1:] = plan.wanted(finer)
                        continue
                    ring = [replace(piece, hop=route.hops[0])]
                try:
                    await follow(ring)
                except PeerError as failure:  # what it has saved is not asked for again
                    pieces[:] = [_unsaved(each) if each.hop and each.peer == failure.peer else each for each in pieces]
                    raise
            return grad

        async def follow(ring: Sequence[MicrobatchPiece]) -> None:
            """Visit these pieces, the last ones of all, in reverse, as far as answers can be used."""
            nonlocal grad
            unused = [each.hop for each in ring if each.hop is not None]
            try:
                async with self._servers.backward_ring(plan, ring, grad, ledger) as servers:
                    for piece, asked in zip(ring, servers, strict=True):
                        # A server gives what it saved once. After that, a server is sent the whole piece.
                        pieces[-1] = _unsaved(pieces[-1])
                        race = self._late.race(asked, partial(by_others, piece, grad), late=late)
                        found = await self._audited.backward(plan, piece, grad, race.answer, may_sum=asked.may_sum)
                        if race.others is not None:
                            found = PieceGradients(race.others.inputs_BTD, race.others.factors)
                        if found is None:
                            return
                        factors.update(found.factors)
                        if ledger is not None and found.summed_in is not None:
                            ledger.count(found.summed_in, SummedPass(number, pieces[-1], grad))
                        grad = grad if found.inputs_BTD is None else found.inputs_BTD
                        pieces.pop()
                        if race.others is not None or self._audited.has_lied(piece.peer):
                            return
                        unused.pop(0)
            finally:
                if ledger is not None:
                    ledger.close(unused)

        async def by_others(piece: MicrobatchPiece, grad_BTD: torch.Tensor) -> Gradients:
            avoided = await self._before_others(piece, late)
            unsaved = [replace(piece, hop=None, saved_as=None)]
            return await self._backward(plan, unsaved, grad_BTD, avoided, number=number)

        return Gradients(await self._with_failover(span, go_on, late), factors)

    async def _before_others(self, piece: MicrobatchPiece, late: frozenset[str]) -> frozenset[str]:
        """The servers that are late, that of this piece too, once others can be asked. Raises `MissingBlocks`."""
        assert piece.hop is not None
        late |= {piece.peer}
        await self._late.before_others(piece.hop, piece.hidden, late, pass_needs(piece.hidden))
        return late

    async def _route(self, span: Span, excluded: Set[Holding], late: frozenset[str], needs: Needs) -> Route:
        """A route for a pass. If servers are `late`, it goes over others. Raises as `Swarm.route` does."""
        return await self._swarm.route_of_others(span, late, excluded, needs=needs, rather_confirmed=bool(late))

    async def _with_failover(self, span: Span, act: Callable[[Set[Holding]], Awaitable[T]], late: frozenset[str]) -> T:
        """`act` until it succeeds. If servers are `late`, they are waited for, and not others that may come."""
        return await self._swarm.with_failover(span, act, at_most=0.0 if late else None)

    def _saved_ring(self, pieces: Sequence[MicrobatchPiece]) -> Sequence[MicrobatchPiece]:
        """The last pieces in reverse, as far as healthy servers have saved them and can push to each other."""
        saved = itertools.takewhile(
            lambda each: each.saved_as is not None and not self._swarm.servers.is_avoided(each.peer), reversed(pieces)
        )
        return self._servers.rings.first_ring(list(saved))

    async def _all(self, works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of all works, of which a limited number run at once. The first error ends the others."""

        async def when_allowed(work: Coroutine[Any, Any, T]) -> T:
            try:
                async with self._in_flight:
                    return await work
            finally:
                work.close()  # it may have been cancelled before it began

        return await _together(when_allowed(work) for work in works)


@dataclass(frozen=True)
class _TakenSum:
    """What a server has `found` as a sum of gradients of factors, by block, or what others have, if they were faster.

    Both are None if the sum is lost.
    """

    of: ServerSum
    found: Mapping[int, FactorGradients] | None = None
    by_others: Mapping[int, FactorGradients] | None = None

    @property
    def peer(self) -> str:
        return self.of.hop.server.peer


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all works, which run at once. The first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _planned(plan: PassPlan, microbatch: MicrobatchPiece, route: Route) -> list[MicrobatchPiece]:
    """The pieces of a microbatch on a route, all with the inputs of the microbatch."""
    hops = [part for each in route.hops for part in plan.parts(each, microbatch.hidden)]
    names = [secrets.token_hex(16) if plan.wants(hop.span) else None for hop in hops]
    return [replace(microbatch, span=hop.span, hop=hop, saved_as=name) for hop, name in zip(hops, names, strict=True)]


def _unsaved(piece: MicrobatchPiece) -> MicrobatchPiece:
    return replace(piece, saved_as=None)
