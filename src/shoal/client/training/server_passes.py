"""Single passes of a microbatch on servers: what each is asked, and whether its answer fits.

Servers that can push to each other are asked together, as a ring: the client sends the first one its inputs, and each
pushes its outputs to the next one, beside answering them. The next one says in its answer what it was pushed, by its
digest. So the client knows of every answer what it was computed from, as if it had sent that itself.
"""

# B sequences, T tokens, D hidden size, N rows or factors

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from shoal.client.swarm.answers import OTHER_THAN_ASKED, finite, plausible, rounded_like, wrong_with
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.gradients import PieceGradients, by_block, fits_a_sum
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.pass_rings import Answered, AskedPart, PassRings, RingPart
from shoal.client.training.ring_turn import RingStart, RingTurn
from shoal.client.training.sum_ledger import ServerSum, SumLedger
from shoal.errors import ServerLost
from shoal.model.peft.factors import FactorGradients
from shoal.net.signing.token_digests import tensor_digest_aside
from shoal.net.wire.codec import Tensors
from shoal.policy.contribution.credit import BACKWARD
from shoal.policy.routing.route import Hop, pass_seconds
from shoal.protocol import Backward, Forward, Norms, NotCached, PassResult, SumResult, TakeSum
from shoal.tensors import TensorName

log = logging.getLogger(__name__)

NORMS_SECONDS = 1.0
"""How long the norms of a block's weights usually take: a server reads all of them."""
SUM_SECONDS = 1.0
"""How long a server usually takes to answer with a sum of gradients, beside the time that these travel."""
SENT_AND_MISSING = "that it lacks what it was just sent"

Inputs = TypeVar("Inputs")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class AskedServer(Generic[Inputs, Answer]):
    """One server that was asked for a pass, which takes it `usual_seconds` if it does nothing else.

    `answer` waits for what it has computed, given the inputs that it should have computed that from: those that the
    server before has answered. None if it has to be asked once more. Raises `PeerError`s. `may_sum` tells whether it
    may add gradients of factors to a sum, in place of answering them.
    """

    hop: Hop
    usual_seconds: float
    turn: RingTurn
    answer: Callable[[Inputs], Coroutine[Any, Any, Answer | None]]
    may_sum: bool = False

    @property
    def peer(self) -> str:
        """The server's peer id."""
        return self.hop.server.peer


AskedOutputs = AskedServer[MicrobatchPiece, torch.Tensor]
"""A server that computes the outputs [B, T, D] of a piece with the right inputs."""
AskedGradients = AskedServer[torch.Tensor, PieceGradients]
"""A server that computes gradients, given the gradient [B, T, D] of its piece's outputs."""
AskedNorms = AskedServer[None, torch.Tensor]
"""A server that computes the norms [N] of rows of weights."""
AskedSum = AskedServer[None, Mapping[int, FactorGradients]]
"""A server that has a sum of gradients of factors, by block."""


class ServerPasses:
    """Asks servers for passes, over connections that are open as long as this is (`async with`)."""

    def __init__(self, swarm: Swarm) -> None:
        self.rings = PassRings(swarm)
        self._swarm = swarm

    async def __aenter__(self) -> Self:
        await self.rings.pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.rings.pool.__aexit__(kind, error, trace)

    async def forward(self, plan: PassPlan, hop: Hop, piece: MicrobatchPiece) -> torch.Tensor:
        """The outputs [B, T, D] of a piece on one server. Raises `PeerError`s."""
        async with self.forward_ring(plan, [replace(piece, hop=hop)]) as (asked,):
            found = await asked.answer(piece)
            assert found is not None  # the client has sent the inputs
            return found

    async def backward(
        self, plan: PassPlan, hop: Hop, piece: MicrobatchPiece, grad_BTD: torch.Tensor
    ) -> PieceGradients | None:
        """The gradients of a piece on one server; `grad_BTD` is that of its outputs.

        None if the server should have saved the piece, and has it no more. Raises `PeerError`s.
        """
        async with self.backward_ring(plan, [replace(piece, hop=hop)], grad_BTD) as (asked,):
            return await asked.answer(grad_BTD)

    @contextlib.asynccontextmanager
    async def forward_ring(
        self, plan: PassPlan, pieces: Sequence[MicrobatchPiece]
    ) -> AsyncIterator[list[AskedOutputs]]:
        """Ask the servers of these pieces, in order, for their outputs. The inputs of the first piece are sent.

        Of the others, the inputs have only the right shape and dtype. A server saves what a backward pass needs if its
        piece is `saved_as` a name. Raises `PeerError`s.
        """
        parts = [self._forward_part(plan, piece, is_pushed=index > 0) for index, piece in enumerate(pieces)]
        async with self.rings.asking(parts) as asked:
            yield [
                self._asked(each, functools.partial(self._outputs, asked, index)) for index, each in enumerate(asked)
            ]

    @contextlib.asynccontextmanager
    async def backward_ring(
        self,
        plan: PassPlan,
        pieces: Sequence[MicrobatchPiece],
        grad_BTD: torch.Tensor,
        sums: SumLedger | None = None,
    ) -> AsyncIterator[list[AskedGradients]]:
        """Ask the servers of these pieces, the last blocks first, for gradients. `grad_BTD` is sent to the first one.

        A piece that a server has saved is not sent again. With `sums`, the servers may add the gradients of factors to
        those, in place of answering them. Raises `PeerError`s.
        """
        parts = [self._backward_part(plan, pieces[0], {"grad": grad_BTD}, sums)]
        parts += [self._backward_part(plan, piece, {}, sums) for piece in pieces[1:]]
        async with self.rings.asking(parts) as asked:
            yield [
                self._asked(each, functools.partial(self._gradients, plan, asked, index))
                for index, each in enumerate(asked)
            ]

    def take_sum(self, plan: PassPlan, of: ServerSum, *, is_whole: bool) -> AskedSum:
        """Ask a server for a sum, in float32 if it `is_whole` or of one pass, else in float64.

        It answers None if it does not have the sum of just the passes that the client counts in it.
        """
        turn, needs_rest = RingTurn(RingStart(1), None), not is_whole and len(of.passes) > 1
        answer = functools.partial(self._sum, plan, of, turn, needs_rest)
        return AskedServer(of.hop, SUM_SECONDS, turn, answer)

    def norms(self, hop: Hop, paths: Sequence[str], num_rows: int) -> AskedNorms:
        """Ask a server for the norms of the rows of some linear layers' weights, `num_rows` in all, of one block."""
        turn = RingTurn(RingStart(1), None)
        return AskedServer(hop, NORMS_SECONDS, turn, functools.partial(self._norms, hop, turn, paths, num_rows))

    # -- what is asked ------------------------------------------------------------------------------------------------

    def _forward_part(self, plan: PassPlan, piece: MicrobatchPiece, *, is_pushed: bool) -> RingPart:
        assert piece.hop is not None
        request = Forward(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=piece.span.start,
            end=piece.span.end,
            adapters=plan.tuning.names(piece.span),
            keep=piece.saved_as,
            seed=piece.seed,
        )
        tensors = piece.tensors()
        if is_pushed:
            del tensors["hidden"]
        return RingPart(piece.hop, request, tensors, plan.tuning.in_span(piece.span), piece)

    def _backward_part(
        self, plan: PassPlan, piece: MicrobatchPiece, grad: dict[TensorName, torch.Tensor], sums: SumLedger | None
    ) -> RingPart:
        assert piece.hop is not None
        trained = plan.trained.in_span(piece.span)
        request = Backward(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=piece.span.start,
            end=piece.span.end,
            adapters=plan.tuning.names(piece.span),
            kept=piece.saved_as,
            seed=piece.seed,
            inputs=plan.needs_inputs_of(piece.span),
            frozen=tuple(block for block in piece.span if block in plan.frozen),
            into=sums.name_for(piece.hop) if sums is not None and fits_a_sum(trained) else None,
        )
        tensors = grad if piece.saved_as is not None else {**piece.tensors(), **grad}
        return RingPart(piece.hop, request, tensors, plan.tuning.in_span(piece.span), piece)

    def _asked(
        self, asked: AskedPart, answer: Callable[[Inputs], Coroutine[Any, Any, Answer | None]]
    ) -> AskedServer[Inputs, Answer]:
        part, times, may_sum = asked.part, 1, False
        if isinstance(part.request, Backward):
            times = BACKWARD if part.request.kept is not None else BACKWARD + 1
            may_sum = part.request.into is not None
        slowness = self._swarm.measurements.slowness(asked.peer)
        usual_seconds = pass_seconds(part.hop, part.num_tokens, slowness=slowness, times=times)
        return AskedServer(part.hop, usual_seconds, asked.turn, answer, may_sum)

    async def _norms(self, hop: Hop, turn: RingTurn, paths: Sequence[str], num_rows: int, _: None) -> torch.Tensor:
        request = Norms(
            model=self._swarm.model.key,
            fingerprint=self._swarm.fingerprint,
            start=hop.span.start,
            end=hop.span.end,
            modules=tuple(paths),
        )
        connection, _reply, tensors = await self.rings.pool.ask(
            hop.server, request, {}, (), usual_seconds=NORMS_SECONDS, turn=turn
        )
        norms_N = tensors.get("factors")
        if norms_N is None or norms_N.shape != (num_rows,) or not finite(norms_N):
            raise _failed(connection, OTHER_THAN_ASKED)
        return norms_N

    async def _sum(
        self, plan: PassPlan, of: ServerSum, turn: RingTurn, needs_rest: bool, _: None
    ) -> Mapping[int, FactorGradients] | None:
        found = await self._half_of_sum(plan, of, turn, keeps_rest=needs_rest)
        if found is None or not needs_rest:
            return found
        rest = await self._half_of_sum(plan, of, turn, keeps_rest=False)
        return None if rest is None else {block: each + rest[block] for block, each in found.items()}

    async def _half_of_sum(
        self, plan: PassPlan, of: ServerSum, turn: RingTurn, *, keeps_rest: bool
    ) -> dict[int, FactorGradients] | None:
        server, request = of.hop.server, TakeSum(name=of.name, keeps_rest=keeps_rest)
        connection, result, tensors = await self.rings.pool.ask(
            server, request, {}, (), usual_seconds=SUM_SECONDS, turn=turn
        )
        if not isinstance(result, SumResult) or result.num_passes != len(of.passes):
            return None
        found_N = tensors.get("factor_grads")
        factors = by_block(plan.trained.in_span(of.hop.span), found_N, result.unused)
        if factors is None or found_N is None or found_N.dtype != torch.float32:
            raise _failed(connection, OTHER_THAN_ASKED)
        return factors

    # -- what is answered ---------------------------------------------------------------------------------------------

    async def _outputs(self, asked: Sequence[AskedPart], index: int, piece: MicrobatchPiece) -> torch.Tensor | None:
        answered = await self._answered(asked, index, piece.hidden)
        if answered is None:
            return None
        connection, result, tensors = answered
        if isinstance(result, NotCached):
            raise _failed(connection, SENT_AND_MISSING)
        return self._received(connection, result, tensors, "hidden", piece)

    async def _gradients(
        self, plan: PassPlan, asked: Sequence[AskedPart], index: int, grad_BTD: torch.Tensor
    ) -> PieceGradients | None:
        answered = await self._answered(asked, index, grad_BTD)
        if answered is None:
            return None
        piece, (connection, result, found) = asked[index].part.piece, answered
        if isinstance(result, NotCached):
            if piece.saved_as is None:
                raise _failed(connection, SENT_AND_MISSING)
            return None
        wants_inputs = plan.needs_inputs_of(piece.span)
        inputs_BTD = self._received(connection, result, found, "grad", piece) if wants_inputs else None
        request = asked[index].part.request
        if result.summed and isinstance(request, Backward) and request.into is not None:
            return PieceGradients(inputs_BTD, {}, request.into)
        factors = by_block(plan.trained.in_span(piece.span), found.get("factor_grads"), result.unused)
        if factors is None or result.summed:
            raise _failed(connection, OTHER_THAN_ASKED)
        return PieceGradients(inputs_BTD, factors)

    async def _answered(self, asked: Sequence[AskedPart], index: int, inputs_BTD: torch.Tensor) -> Answered | None:
        """A server's answer, if it was computed from these inputs, or what it says that it lacks.

        None if the inputs should have been pushed to it, and the client has to send them. Raises `PeerError`s.
        """
        if not index:
            return await asked[index].task
        expected = await tensor_digest_aside(inputs_BTD)
        answered = await asked[index].task
        upstream, downstream = asked[index - 1].peer, asked[index].peer
        broken = self._swarm.measurements.broken_pairs
        if answered is None or (isinstance(answered[1], NotCached) and answered[1].inputs):
            log.info("%s was not pushed what %s has computed: the client carries it", downstream, upstream)
            broken.add(upstream, downstream)
            return None
        connection, result, _ = answered
        if isinstance(result, NotCached):
            return None
        if result.inputs is None:
            raise _failed(connection, OTHER_THAN_ASKED)
        if result.inputs != expected:
            log.warning(
                "%s says that %s pushed something else than it answered: one of them lies", downstream, upstream
            )
            broken.add_for_good(upstream, downstream)
            return None
        return answered

    def _received(
        self,
        connection: Connection,
        result: PassResult,
        tensors: Tensors,
        name: TensorName,
        piece: MicrobatchPiece,
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
