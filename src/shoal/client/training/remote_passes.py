"""Single passes through the swarm, forward and backward: what training makes, and any call without a cache.

A batch is cut into microbatches. They travel at the same time, each over the servers on which it will be ready first.
For each server on its route, a microbatch keeps its inputs there on the client: if that server is gone when the
gradient comes back, another server computes the blocks again from these inputs.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from shoal.client.swarm.answers import joined
from shoal.client.swarm.known.directory_cache import Holding
from shoal.client.swarm.message_sizes import check_length, check_size
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.gradients import FactorSums, Gradients
from shoal.client.training.pass_audits import PassAudits
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan, pass_needs
from shoal.client.training.server_passes import ServerPasses
from shoal.client.training.sum_ledger import ServerSum, SumLedger, SummedPass
from shoal.concurrency import now
from shoal.errors import PeerError
from shoal.model.peft.factors import FactorGradients
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import Needs, Route
from shoal.policy.routing.spread import microbatch_rows
from shoal.spans import Span

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_MICROBATCHES_IN_FLIGHT = 16
"""Microbatches in flight together: enough to keep a route's servers busy, and few enough for their limits."""


class RemotePasses:
    """Forward and backward passes of one client. Its connections are open as long as it is (`async with`)."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._servers = ServerPasses(swarm)
        self._audited = PassAudits(swarm, self._servers)
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
        sums, ledger = FactorSums(), SumLedger() if len(sizes) > 1 else None

        async def one(number: int, pieces: Sequence[MicrobatchPiece], grad: torch.Tensor) -> torch.Tensor | None:
            found = await self._backward(plan, pieces, grad, number=number, ledger=ledger)
            sums.add(number, found.factors)
            return found.inputs_BTD

        found = await self._all(
            one(number, pieces, grad) for number, (pieces, grad) in enumerate(zip(microbatches, grads, strict=True))
        )
        if ledger is not None:
            await self._take(plan, ledger, sums, num_microbatches=len(sizes))
        inputs = [each for each in found if each is not None]
        return Gradients(joined(inputs) if inputs else None, sums.rounded())

    async def norms(self, block: int, paths: Sequence[str], num_rows: int) -> torch.Tensor:
        """The norms of the rows of some linear layers' weights in a block, `num_rows` in all. Raises `SwarmError`s."""
        span = Span(block, block + 1)

        async def ask(excluded: Set[Holding]) -> torch.Tensor:
            (hop,) = (await self._swarm.route(span, excluded, needs=Needs(session=False))).hops
            return await self._servers.norms(hop.server, span, paths, num_rows)

        return await self._swarm.with_failover(span, ask)

    # -- sums on servers ----------------------------------------------------------------------------------------------

    async def _take(self, plan: PassPlan, ledger: SumLedger, sums: FactorSums, *, num_microbatches: int) -> None:
        """Take what servers have summed. The passes of sums that are lost are computed again, each with its own answer.

        Raises `SwarmError`s.
        """

        async def take(of: ServerSum) -> Mapping[int, FactorGradients] | None:
            began = now()
            is_whole = ledger.is_whole(of, num_microbatches=num_microbatches)
            try:
                found = await self._servers.take_sum(plan, of, is_whole=is_whole)
                return None if found is None else await self._audited.sum(plan, of.hop, of.passes, found)
            except PeerError as failure:
                self._swarm.servers.blame(failure, since=began)
            return None

        async def again(one: SummedPass) -> Mapping[int, FactorGradients]:
            return (await self._backward(plan, [_unsaved(one.piece)], one.grad_BTD, number=one.number)).factors

        lost: list[SummedPass] = []
        for each, found in zip(ledger.sums, await self._all(take(each) for each in ledger.sums), strict=True):
            if found is None or self._audited.has_lied(each.hop.server.peer):  # another audit may have found it since
                lost += each.passes
            else:
                sums.join(found)
        if lost:
            log.info("sums of gradients are lost: %d passes are computed again", len(lost))
        for factors in await self._all(again(one) for one in lost):
            sums.join(factors)

    # -- one microbatch -----------------------------------------------------------------------------------------------

    async def _forward(self, plan: PassPlan, microbatch: MicrobatchPiece) -> tuple[torch.Tensor, list[MicrobatchPiece]]:
        """The outputs of a microbatch, and the pieces of it that servers computed, in order."""
        hidden, pieces, end = microbatch.hidden, list[MicrobatchPiece](), microbatch.span.end

        async def go_on(excluded: Set[Holding]) -> torch.Tensor:
            while (start := pieces[-1].span.end if pieces else microbatch.span.start) < end:
                route = await self._swarm.route(Span(start, end), excluded, needs=pass_needs(hidden))
                with self._swarm.measurements.reserving(route):
                    await follow(_planned(plan, microbatch, route))
            return hidden

        async def follow(planned: Sequence[MicrobatchPiece]) -> None:
            """Send it over a route, or as far as answers can be used."""
            nonlocal hidden
            while planned:
                ring = self._servers.rings.first_ring(planned)
                planned = planned[len(ring) :]
                async with self._servers.forward_ring(plan, [replace(each, hidden=hidden) for each in ring]) as asked:
                    for each, outputs in zip(ring, asked, strict=True):
                        piece = replace(each, hidden=hidden)
                        computed = await self._audited.forward(plan, piece, outputs)
                        if computed is None:
                            return
                        hidden = computed
                        pieces.append(piece)
                        if self._audited.has_lied(piece.peer):
                            return

        return await self._swarm.with_failover(microbatch.span, go_on), pieces

    async def _backward(
        self,
        plan: PassPlan,
        visited: Sequence[MicrobatchPiece],
        grad: torch.Tensor,
        *,
        number: int,
        ledger: SumLedger | None = None,
    ) -> Gradients:
        """The gradients of a microbatch, whose pieces are visited in reverse as far as gradients are wanted.

        With a `ledger`, it has those of factors that servers keep in sums.
        """
        factors: dict[int, FactorGradients] = {}
        span = Span(visited[0].span.start, visited[-1].span.end)
        pieces = plan.wanted(visited)

        async def go_on(excluded: Set[Holding]) -> torch.Tensor:
            while pieces:
                ring = self._saved_ring(pieces)
                if not ring:
                    piece = pieces[-1] = replace(pieces[-1], saved_as=None)
                    route = await self._swarm.route(piece.span, excluded, needs=pass_needs(grad))
                    if len(route.hops) > 1:  # several servers replace one: compute the inputs of each of them
                        _, finer = await self._forward(plan, piece)
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
                async with self._servers.backward_ring(plan, ring, grad, ledger) as asked:
                    for piece, gradients in zip(ring, asked, strict=True):
                        # A server gives what it saved once. After that, a server is sent the whole piece.
                        pieces[-1] = _unsaved(pieces[-1])
                        found = await self._audited.backward(plan, piece, grad, gradients, may_sum=ledger is not None)
                        if found is None:
                            return
                        factors.update(found.factors)
                        if ledger is not None and found.summed_in is not None:
                            ledger.count(found.summed_in, SummedPass(number, pieces[-1], grad))
                        grad = grad if found.inputs_BTD is None else found.inputs_BTD
                        pieces.pop()
                        if self._audited.has_lied(piece.peer):
                            return
                        unused.pop(0)
            finally:
                if ledger is not None:
                    ledger.close(unused)

        inputs_BTD = await self._swarm.with_failover(span, go_on)
        return Gradients(inputs_BTD if plan.inputs_wanted else None, factors)

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

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(when_allowed(work)) for work in works]
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
