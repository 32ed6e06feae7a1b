"""Single forward and backward passes and norms, without a cache: what training clients ask a server for."""

# B sequences, T tokens, D hidden size, F factors

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch

from shoal.model.body import Body
from shoal.policy.batching.engine_limits import Limits
from shoal.protocol import Backward, Forward, Norms, TakeSum
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.validator import RequestValidator
from shoal.server.refusals import Refused, busy, rejected
from shoal.server.step_inputs import StepInputs
from shoal.server.training import block_passes
from shoal.server.training.adapter_store import AdapterStore, MissingFromCache
from shoal.server.training.gradient_sums import KEPT_SECONDS, GradientSums, TakenSum
from shoal.server.training.pass_blocks import PassBlocks
from shoal.server.training.saved_activations import ActivationStore, SavedActivations

T = TypeVar("T")


class SinglePasses:
    """Computes passes piece by piece, and keeps what clients need for their next ones: adapters and activations."""

    def __init__(self, body: Body, validator: RequestValidator, loop: EngineLoop, limits: Limits) -> None:
        self.activations = ActivationStore(body, max_bytes=limits.activation_bytes, seconds=limits.activation_seconds)
        self.sums = GradientSums(
            self.activations.budget, client_bytes=limits.activation_bytes // 2, seconds=KEPT_SECONDS
        )
        self.adapters = AdapterStore(body, max_bytes=limits.adapter_bytes, drop_adapters=self.activations.drop_adapters)
        self.waiting_bytes = 0  # of the inputs of passes that wait or are computed
        self._body = body
        self._validator = validator
        self._loop = loop
        self._limits = limits

    async def forward(
        self, peer: str, request: Forward, inputs: StepInputs, *, payer: str | None = None
    ) -> torch.Tensor:
        """The [B, T, D] outputs of a span. Its time counts for `payer`, or for the peer.

        Raises `Refused`, and `MissingFromCache`.
        """
        payer = peer if payer is None else payer
        blocks = self._blocks(peer, request, inputs)
        if request.keep is None:
            return await self._submit(payer, inputs.num_bytes, block_passes.forward(blocks))
        saved, weights = self.activations.new(blocks), self.activations.weight_pointers
        pieces = block_passes.forward_saving(blocks, saved, weights)
        outputs_BTD = await self._submit(payer, inputs.num_bytes, pieces, saved)
        if saved.is_complete:
            self.activations.save(peer, request.keep, saved)
        else:
            saved.drop()
        return outputs_BTD

    async def backward(
        self,
        peer: str,
        request: Backward,
        grad_BTD: torch.Tensor,
        inputs: StepInputs | None,
        *,
        payer: str | None = None,
    ) -> block_passes.Gradients:
        """The gradients of a span's inputs and factors. `inputs` are None if the server should have saved them.

        Its time counts for `payer`, or for the peer. Raises `Refused`, and `MissingFromCache`.
        """
        span = self._validator.span_of(request)
        saved = None if request.kept is None else self.activations.take(peer, request.kept)
        if saved is None:
            if inputs is None:
                raise MissingFromCache(activations=True)
            saved = self.activations.new(self._blocks(peer, request, inputs))
        blocks = saved.blocks
        if blocks.span != span:
            saved.drop()
            raise rejected(f"blocks {span} of a pass through {blocks.span}")
        if grad_BTD.shape != blocks.inputs_BTD.shape:
            saved.drop()
            raise rejected("a backward pass needs a gradient of its output's shape")
        learning = frozenset(blocks.adapters).difference(request.frozen)
        pieces = block_passes.backward(
            blocks, grad_BTD, saved, self.activations.weight_pointers, inputs=request.inputs, trained=learning
        )
        try:
            into = self.sums.of(peer, request) if learning else None
        except Refused:
            saved.drop()
            raise
        if into is not None:
            pieces = block_passes.summing(pieces, into)
        num_bytes = grad_BTD.nbytes + (0 if inputs is None else inputs.num_bytes)
        return await self._submit(peer if payer is None else payer, num_bytes, pieces, saved)

    async def take_sum(self, peer: str, request: TakeSum) -> TakenSum:
        """A sum of gradients that the client has named. Raises `MissingFromCache` if it is gone."""
        taken = await self.sums.take(peer, request.name, keeps_rest=request.keeps_rest)
        if taken is None:
            raise MissingFromCache(activations=True)
        return taken

    async def norms(self, request: Norms, *, payer: str) -> torch.Tensor:
        """The norms [F] of the rows of some linear layers' weights. Raises `Refused`."""
        (block,) = self._validator.span_of(request)
        self._validator.check_training()
        try:
            return await self._submit(payer, 0, block_passes.norms(self._body, block, request.modules))
        except ValueError as error:
            raise rejected(str(error)) from None

    def check(self, peer: str, request: Forward | Backward) -> None:
        """A pass has to be possible, as far as that can be told before its inputs are here.

        Raises `Refused`, and `MissingFromCache`.
        """
        span = self._validator.span_of(request)
        self._validator.check_training()
        self.adapters.of(peer, request, span)
        kept = request.kept if isinstance(request, Backward) else None
        is_sent = any(spec.name == "hidden" for spec in request.tensors)
        if kept is not None and not is_sent and not self.activations.has(peer, kept):
            raise MissingFromCache(activations=True)

    def release(self, peer: str) -> None:
        """Forget all that was kept for a client that is gone."""
        self.adapters.release(peer)
        self.activations.release(peer)
        self.sums.release(peer)

    def _blocks(self, peer: str, request: Forward | Backward, inputs: StepInputs) -> PassBlocks:
        span = self._validator.span_of(request)
        adapters = self.adapters.of(peer, request, span)
        self._validator.check_factors(sum(len(adapter.parameters) for adapter in adapters.values()))
        return PassBlocks(self._body, span, inputs, adapters, request.seed)

    async def _submit(
        self, payer: str, num_bytes: int, pieces: block_passes.Pieces[T], saved: SavedActivations | None = None
    ) -> T:
        """The outcome of a pass whose inputs take `num_bytes`. What it saved is dropped if it fails."""
        try:
            with self._waiting(num_bytes):
                return await self._loop.submit_pass(pieces, payer)
        except BaseException:
            if saved is not None:
                saved.drop()
            raise

    @contextlib.contextmanager
    def _waiting(self, num_bytes: int) -> Iterator[None]:
        """Count the inputs of a pass while it waits. Raises `Refused` if too many bytes wait already."""
        if self.waiting_bytes and self.waiting_bytes + num_bytes > self._limits.waiting_bytes:
            raise busy("too many passes are waiting")
        self.waiting_bytes += num_bytes
        try:
            yield
        finally:
            self.waiting_bytes -= num_bytes
