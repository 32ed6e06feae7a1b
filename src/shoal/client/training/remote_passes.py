"""Single passes through the swarm, forward and backward: what training makes, and any call without a cache.

A batch is cut into microbatches that go their ways at the same time, each over the servers on which it will be ready
first. For every server on its way a microbatch keeps its inputs there: should that server be gone when the gradient
comes back, another one computes it from them.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable, Sequence, Set
from dataclasses import replace
from typing import Any, TypeVar

import torch

from shoal.client.swarm.connection import Connection, finite, plausible
from shoal.client.swarm.message_sizes import check_length, check_size
from shoal.client.swarm.swarm import Holding, Swarm
from shoal.client.training.connection_pool import ConnectionPool
from shoal.client.training.gradients import FactorSums, Gradients, by_block
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.errors import ServerLost
from shoal.model.peft.factors import FactorGradients
from shoal.net.wire.codec import Tensors
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import SLOWEST, Hop, Needs
from shoal.policy.routing.spread import microbatch_rows
from shoal.protocol import Backward, Forward, Norms, NotCached, PassResult
from shoal.spans import Span
from shoal.tensors import TensorName

T = TypeVar("T")

MAX_MICROBATCHES_IN_FLIGHT = 16
"""Microbatches under way together: enough to keep a chain of servers busy, and few enough for their limits."""


class RemotePasses:
    """Forward and backward passes of one client."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._pool = ConnectionPool(swarm.connect, swarm.adapter_sync)
        self._at_once = asyncio.Semaphore(MAX_MICROBATCHES_IN_FLIGHT)

    async def close(self) -> None:
        """Let go of the servers."""
        await self._pool.close()

    async def forward(
        self, plan: PassPlan, hidden_BTD: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[list[MicrobatchPiece]]]:
        """The outputs [B, T, D] of a span and, for each microbatch, the pieces that `backward` needs.

        Raises `PeerError`s, and `UserError` for a sequence that is too long, alone or with the gradient that is wanted.
        """
        hidden_BTD = as_received(hidden_BTD, self._swarm.config.wire)
        batch_size, num_tokens, _ = hidden_BTD.shape
        check_length(num_tokens)
        num_servers = await self._swarm.num_servers(plan.span)
        rows = microbatch_rows(batch_size, num_tokens, num_servers=num_servers)
        batches = plan.microbatches(hidden_BTD, positions, mask, rows=rows)
        if plan.wanted_from is not None:  # should a server be lost on the way back, the next is sent all of this
            check_size({**batches[0].tensors(), "grad": batches[0].hidden})
        results = await self._together(self._forward(plan, batch) for batch in batches)
        return _joined([output for output, _ in results]), [pieces for _, pieces in results]

    async def backward(
        self, plan: PassPlan, batches: Sequence[Sequence[MicrobatchPiece]], grad_BTD: torch.Tensor
    ) -> Gradients:
        """The gradients of what went into `forward` and of the factors, from that of what came out."""
        sizes = [pieces[0].hidden.shape[0] for pieces in batches]
        grads = as_received(grad_BTD, self._swarm.config.wire).split(sizes)
        sums = FactorSums()

        async def one(number: int, pieces: Sequence[MicrobatchPiece], grad: torch.Tensor) -> torch.Tensor | None:
            found = await self._backward(plan, pieces, grad)
            sums.add(number, found.factors)
            return found.inputs_BTD

        found = await self._together(
            one(number, pieces, grad) for number, (pieces, grad) in enumerate(zip(batches, grads, strict=True))
        )
        inputs = [each for each in found if each is not None]
        return Gradients(_joined(inputs) if inputs else None, sums.blocks)

    async def _together(self, works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of all, some at a time. The first error ends the others and is raised."""

        async def in_turn(work: Coroutine[Any, Any, T]) -> T:
            try:
                async with self._at_once:
                    return await work
            finally:
                work.close()  # if its turn never came

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(in_turn(work)) for work in works]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def norms(self, block: int, paths: Sequence[str], num_rows: int) -> torch.Tensor:
        """The norms of so many rows in all, of the weights of some linear layers of a block."""
        span = Span(block, block + 1)

        async def ask(excluded: Set[Holding]) -> torch.Tensor:
            (hop,) = (await self._swarm.route(span, excluded, needs=Needs(ring=False))).hops
            request = Norms(
                model=self._swarm.model.key,
                fingerprint=self._swarm.fingerprint,
                start=span.start,
                end=span.end,
                modules=tuple(paths),
            )
            connection, _, tensors = await self._pool.ask(hop.server, request, {}, (), usual_seconds=1.0)
            found = tensors.get("factors")
            if found is None or found.shape != (num_rows,) or not finite(found):
                raise _wrong(connection, "something else than was asked")
            return found

        return await self._swarm.with_failover(span, ask)

    # -- one microbatch -----------------------------------------------------------------------------------------------

    async def _forward(self, plan: PassPlan, whole: MicrobatchPiece) -> tuple[torch.Tensor, list[MicrobatchPiece]]:
        hidden, pieces, end = whole.hidden, list[MicrobatchPiece](), whole.span.end

        async def walk(excluded: Set[Holding]) -> torch.Tensor:
            nonlocal hidden
            start = pieces[-1].span.end if pieces else whole.span.start
            if start == end:
                return hidden
            route = await self._swarm.route(Span(start, end), excluded, needs=_pass_needs(hidden))
            with self._swarm.reserving(route):
                for hop in (part for each in route.hops for part in plan.parts(each, hidden)):
                    keep = secrets.token_hex(16) if plan.wants(hop.span) else None
                    piece = replace(whole, span=hop.span, hidden=hidden, hop=hop, kept=keep)
                    hidden = await self._ask_forward(plan, hop, piece)
                    pieces.append(piece)
            return hidden

        return await self._swarm.with_failover(whole.span, walk), pieces

    async def _backward(self, plan: PassPlan, visited: Sequence[MicrobatchPiece], grad: torch.Tensor) -> Gradients:
        factors: dict[int, FactorGradients] = {}
        whole = Span(visited[0].span.start, visited[-1].span.end)
        pieces = plan.wanted(visited)

        async def walk_back(excluded: Set[Holding]) -> torch.Tensor:
            nonlocal grad
            while pieces:
                piece = pieces[-1]
                pieces[-1] = replace(piece, kept=None)  # it is given once; whoever is asked after that computes it anew
                hop = piece.hop if piece.kept is not None else None
                if hop is None or self._swarm.is_avoided(hop.server.peer):
                    piece = pieces[-1]
                    route = await self._swarm.route(piece.span, excluded, needs=_pass_needs(grad))
                    if len(route.hops) > 1:  # its server is gone, several take its place: find out what goes into each
                        _, finer = await self._forward(plan, piece)
                        pieces[-1:] = plan.wanted(finer)
                        continue
                    hop = route.hops[0]
                found = await self._ask_backward(plan, hop, piece, grad)
                if found is None:  # the server does not have it any more
                    continue
                gradient, own = found
                factors.update(own)
                grad = grad if gradient is None else gradient
                pieces.pop()
            return grad

        inputs_BTD = await self._swarm.with_failover(whole, walk_back)
        return Gradients(inputs_BTD if plan.inputs_wanted else None, factors)

    # -- one server ---------------------------------------------------------------------------------------------------

    async def _ask_forward(self, plan: PassPlan, hop: Hop, piece: MicrobatchPiece) -> torch.Tensor:
        request = Forward(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=hop.span.start,
            end=hop.span.end,
            adapters=plan.tuning.names(hop.span),
            keep=piece.kept,
            seed=piece.seed,
        )
        connection, result, tensors = await self._ask(plan, hop, request, piece.tensors(), piece)
        if isinstance(result, NotCached):
            raise _wrong(connection, "that it lacks what it was just sent")
        return self._received(connection, result, tensors, "hidden", piece)

    async def _ask_backward(
        self, plan: PassPlan, hop: Hop, piece: MicrobatchPiece, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, dict[int, FactorGradients]] | None:
        """The gradients of a piece's inputs and wanted factors; `None` if the server has not kept what was computed."""
        assert plan.wanted_from is not None
        inputs = plan.inputs_wanted or plan.wanted_from < piece.span.start
        request = Backward(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=piece.span.start,
            end=piece.span.end,
            adapters=plan.tuning.names(piece.span),
            kept=piece.kept,
            seed=piece.seed,
            inputs=inputs,
            frozen=tuple(block for block in piece.span if block in plan.frozen),
        )
        tensors: Tensors = {"grad": grad} if piece.kept is not None else {**piece.tensors(), "grad": grad}
        connection, result, found = await self._ask(plan, hop, request, tensors, piece)
        if isinstance(result, NotCached):
            if piece.kept is None:
                raise _wrong(connection, "that it lacks what it was just sent")
            return None
        gradient = self._received(connection, result, found, "grad", piece) if inputs else None
        own = by_block(plan.learning.of(piece.span), found.get("factor_grads"), result.unused)
        if own is None:
            raise _wrong(connection, "something else than was asked")
        return gradient, own

    async def _ask(
        self, plan: PassPlan, hop: Hop, request: Forward | Backward, tensors: Tensors, piece: MicrobatchPiece
    ) -> tuple[Connection, PassResult | NotCached, Tensors]:
        batch_size, num_tokens, _ = piece.hidden.shape
        usual = batch_size * num_tokens / max(hop.server.prefill_speed or 0.0, SLOWEST)
        adapters = plan.tuning.of(piece.span)
        connection, reply, found = await self._pool.ask(hop.server, request, tensors, adapters, usual_seconds=usual)
        self._swarm.record_answer(hop)
        assert isinstance(reply, PassResult | NotCached)
        return connection, reply, found

    def _received(
        self, connection: Connection, result: PassResult, tensors: Tensors, name: TensorName, piece: MicrobatchPiece
    ) -> torch.Tensor:
        """A tensor of the shape of the hidden states, as precise as the user wants tensors to travel."""
        found, encoding, wire = tensors.get(name), result.encoding_of(name), self._swarm.config.wire
        hidden = piece.hidden
        if found is None or found.shape != hidden.shape or found.dtype != hidden.dtype:
            raise _wrong(connection, "something else than was asked")
        if encoding not in ("raw", connection.encoding):
            raise _wrong(connection, f"in {encoding}, which nobody asked for")
        if name == "hidden" and not plausible(found, hidden, piece.mask):
            raise _wrong(connection, "with numbers that are not finite")  # gradients may overflow: scalers look at that
        # The same from a server that does not know the encoding: which one it was must not make a difference.
        return found if encoding == wire else as_received(found, wire)


def _wrong(connection: Connection, what: str) -> ServerLost:
    error = connection.wrong(what)
    connection.fail(error)
    return error


def _pass_needs(hidden_BTD: torch.Tensor) -> Needs:
    """What a route is needed for: one answer of each server to the client, which leaves nothing there."""
    batch_size, num_tokens, _ = hidden_BTD.shape
    return Needs(step_tokens=batch_size * num_tokens, ring=False, dtype=str(hidden_BTD.dtype).removeprefix("torch."))


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))
