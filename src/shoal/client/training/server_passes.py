"""Single passes of a microbatch on one server: what the server is asked, and whether its answer fits."""

# B sequences, T tokens, D hidden size, N rows or factors

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from shoal.client.swarm.answers import OTHER_THAN_ASKED, finite, plausible, rounded_like, wrong_with
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.connection_pool import ConnectionPool
from shoal.client.training.gradients import by_block
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.errors import ServerLost
from shoal.model.peft.factors import FactorGradients
from shoal.net.wire.codec import Tensors
from shoal.peers import ServerInfo
from shoal.policy.contribution.credit import BACKWARD
from shoal.policy.routing.route import SLOWEST, Hop
from shoal.protocol import Backward, Forward, Norms, NotCached, PassResult
from shoal.spans import Span
from shoal.tensors import TensorName

NORMS_SECONDS = 1.0
"""How long the norms of a block's weights usually take: a server reads all of them."""
PieceGradients = tuple[torch.Tensor | None, dict[int, FactorGradients]]
"""The gradients of a piece's inputs [B, T, D], if they are needed, and of its factors by block."""
SENT_AND_MISSING = "that it lacks what it was just sent"


class ServerPasses:
    """Asks servers for passes, over a pool of connections that is open as long as this is (`async with`)."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._pool = ConnectionPool(swarm.connect, swarm.adapter_sync)

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, trace)

    async def forward(self, plan: PassPlan, hop: Hop, piece: MicrobatchPiece) -> torch.Tensor:
        """The outputs [B, T, D] of a piece. If it is `saved_as` a name, the server saves what a backward pass needs.

        Raises `PeerError`s.
        """
        request = Forward(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=hop.span.start,
            end=hop.span.end,
            adapters=plan.tuning.names(hop.span),
            keep=piece.saved_as,
            seed=piece.seed,
        )
        connection, result, tensors = await self._ask(plan, hop, request, piece.tensors(), piece)
        if isinstance(result, NotCached):
            raise _failed(connection, SENT_AND_MISSING)
        return self._received(connection, result, tensors, "hidden", piece)

    async def backward(
        self, plan: PassPlan, hop: Hop, piece: MicrobatchPiece, grad_BTD: torch.Tensor
    ) -> PieceGradients | None:
        """The gradients of a piece; `grad_BTD` is that of its outputs.

        A piece that the server has saved is not sent again; the answer is `None` if the server has it no more. Raises
        `PeerError`s.
        """
        wants_inputs = plan.needs_inputs_of(piece.span)
        request = Backward(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=piece.span.start,
            end=piece.span.end,
            adapters=plan.tuning.names(piece.span),
            kept=piece.saved_as,
            seed=piece.seed,
            inputs=wants_inputs,
            frozen=tuple(block for block in piece.span if block in plan.frozen),
        )
        tensors: Tensors = {"grad": grad_BTD}
        if piece.saved_as is None:
            tensors = {**piece.tensors(), **tensors}
        connection, result, found = await self._ask(plan, hop, request, tensors, piece)
        if isinstance(result, NotCached):
            if piece.saved_as is None:
                raise _failed(connection, SENT_AND_MISSING)
            return None
        inputs_BTD = self._received(connection, result, found, "grad", piece) if wants_inputs else None
        factors = by_block(plan.trained.in_span(piece.span), found.get("factor_grads"), result.unused)
        if factors is None:
            raise _failed(connection, OTHER_THAN_ASKED)
        return inputs_BTD, factors

    async def norms(self, server: ServerInfo, span: Span, paths: Sequence[str], num_rows: int) -> torch.Tensor:
        """The norms [N] of the rows of some linear layers' weights, `num_rows` in all, of the one block of a span.

        Raises `PeerError`s.
        """
        request = Norms(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=span.start,
            end=span.end,
            modules=tuple(paths),
        )
        connection, _, tensors = await self._pool.ask(server, request, {}, (), usual_seconds=NORMS_SECONDS)
        norms_N = tensors.get("factors")
        if norms_N is None or norms_N.shape != (num_rows,) or not finite(norms_N):
            raise _failed(connection, OTHER_THAN_ASKED)
        return norms_N

    async def _ask(
        self, plan: PassPlan, hop: Hop, request: Forward | Backward, tensors: Tensors, piece: MicrobatchPiece
    ) -> tuple[Connection, PassResult | NotCached, Tensors]:
        batch_size, num_tokens, _ = piece.hidden.shape
        usual = batch_size * num_tokens / max(hop.server.prefill_speed or 0.0, SLOWEST)
        adapters = plan.tuning.in_span(piece.span)
        connection, reply, answer = await self._pool.ask(hop.server, request, tensors, adapters, usual_seconds=usual)
        self._swarm.record_answer(hop)
        assert isinstance(reply, PassResult | NotCached)
        if connection.tab is not None and isinstance(reply, PassResult):
            times = BACKWARD if isinstance(request, Backward) else 1
            connection.tab.add(batch_size * num_tokens, Span(request.start, request.end), times=times)
        return connection, reply, answer

    def _received(
        self, connection: Connection, result: PassResult, tensors: Tensors, name: TensorName, piece: MicrobatchPiece
    ) -> torch.Tensor:
        """A tensor of the shape of the piece's inputs, as precise as the user wants tensors to travel."""
        found, encoding, hidden_BTD = tensors.get(name), result.encoding_of(name), piece.hidden
        wrong = wrong_with(found, encoding, shape=hidden_BTD.shape, dtype=hidden_BTD.dtype, allowed=connection.encoding)
        if found is None or wrong is not None:
            raise _failed(connection, wrong or OTHER_THAN_ASKED)
        # Gradients may overflow: the user's gradient scaler looks for that.
        if name == "hidden" and not plausible(found, hidden_BTD, piece.mask):
            raise _failed(connection, "with numbers that are not finite")
        return rounded_like(found, encoding, wire=self._swarm.config.wire)


def _failed(connection: Connection, what: str) -> ServerLost:
    """The error of a server that answered like that; its connection is of no more use."""
    error = connection.wrong(what)
    connection.fail(error)
    return error
