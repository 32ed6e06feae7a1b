"""What a server computes: steps of sessions, with a cache, and single forward and backward passes, without."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

import torch

from shoal.adapters import salted
from shoal.errors import UnsupportedOperation
from shoal.model.body import Body
from shoal.model.body_cache import BodyCache
from shoal.policy.scheduling import PassTimeModel
from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS
from shoal.protocol import MAX_PAYLOAD_BYTES, Backward, Forward, Norms, Open, Step
from shoal.server.engine.cpu_turns import CpuTurns
from shoal.server.engine.engine_limits import Limits
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.validator import RequestValidator
from shoal.server.executor import Executor, alone
from shoal.server.kv.batch import Pass
from shoal.server.kv.output_head import Answer, ServerHead
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.pages import PagePool, pages_for
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import busy, cannot_rewind, misrouted, preempted, rejected
from shoal.server.speed_watch import Speeds, Watch
from shoal.server.step_inputs import StepInputs, Tensors
from shoal.server.training import block_passes as training
from shoal.server.training.adapter_store import AdapterStore, MissingFromCache
from shoal.server.training.pass_blocks import PassBlocks
from shoal.server.training.saved_activations import ActivationStore, SavedActivations
from shoal.spans import Span

T = TypeVar("T")

HASH_ASIDE_TOKENS = 64
"""So many tokens take long enough to be read for their names that others should not wait for it."""


class Engine:
    """Computes one span of one model for everybody, as long as `running()` is entered.

    `cache` is the memory of a body that computes packed; the sessions of others keep Transformers' caches, and of
    their pages only the number counts.
    """

    def __init__(
        self,
        body: Body,
        executor: Executor,
        validator: RequestValidator,
        *,
        compute: Pass,
        cache: PagedCache | None,
        num_pages: int,
        cpu_turns: CpuTurns | None,
        pass_time: PassTimeModel,
        limits: Limits,
        head: ServerHead | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._body = body
        self._executor = executor
        self._validator = validator
        self._cache = cache
        self._limits = limits
        self._pool = PagePool(num_pages)
        self._watch = watch
        self._loop = EngineLoop(
            compute,
            executor,
            self._pool,
            head=head,
            cpu_turns=cpu_turns,
            pass_time=pass_time,
            limits=limits,
            watch=watch,
        )
        self._activations = ActivationStore(body, most_bytes=limits.activation_bytes, seconds=limits.activation_seconds)
        self.adapters = AdapterStore(
            body, most_bytes=limits.adapter_bytes, drop_adapters=self._activations.drop_adapters
        )
        self._num_opened = itertools.count()
        self._waiting_bytes = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this is entered, what is asked for is computed."""
        task = asyncio.create_task(self._loop.run(), name="shoal-engine")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def span(self) -> Span:
        """The blocks that are computed here."""
        return self._body.span

    @property
    def speeds(self) -> Speeds | None:
        """How fast it is, as far as that is known."""
        return None if self._watch is None else self._watch.speeds

    @property
    def cache_tokens(self) -> int:
        """For how many tokens of sessions there is room in all."""
        return self._pool.num_pages * PAGE_TOKENS

    @property
    def cache_tokens_left(self) -> int:
        """For how many more tokens there is room."""
        return self._pool.num_available * PAGE_TOKENS

    @property
    def queue_length(self) -> int:
        """How many steps and passes wait, for their turn or for room."""
        return len(self._loop.steps) + len(self._loop.passes)

    @property
    def num_passes(self) -> int:
        """How many passes were computed so far: whoever waits sees by it that the server works."""
        return self._loop.num_passes

    @property
    def _num_in_queue(self) -> int:
        return sum(not step.session.running for step in self._loop.steps)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every page is somebody's or can be taken. To be called between passes."""
        self._pool.check_integrity(page for session in self._loop.sessions for page in session.pages)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def open(self, peer: str, request: Open, tensors: Tensors) -> tuple[SessionCache, torch.Tensor | None]:
        """A new session; and the outputs [B, T, D] of its first tokens, as far as they are computed already.

        Raises `Refused`, and `MissingFromCache`.
        """
        span = self._validator.span_of(request)
        adapters = self.adapters.of(peer, request, span)
        if request.expected_length > self._validator.max_length:
            raise rejected(
                f"a session of {request.expected_length} tokens; the model allows {self._validator.max_length}"
            )
        self._check_fits(request.batch_size, request.expected_length)
        names = _names_of(request, tensors)
        session = SessionCache(
            self._pool,
            span,
            opened=next(self._num_opened),
            peer=peer,
            batch_size=request.batch_size,
            salt=salted(request.salt, request.adapters),
            adapters=adapters,
        )
        self._loop.join(session)
        if self._cache is None:
            session.cache = self._body.new_cache(span)
            return session, None
        token_bytes = request.batch_size * self._validator.hidden_size * 4
        session.adopt(names, most_pages=MAX_PAYLOAD_BYTES // 2 // (token_bytes * PAGE_TOKENS))
        if not session.num_tokens:
            return session, None
        return session, torch.stack([self._cache.outputs(row.pages) for row in session.rows]).cpu()

    def close(self, session: SessionCache) -> None:
        """Give a session's pages back. May be called twice."""
        session.release()
        self._loop.sessions.discard(session)
        self._loop.wake()

    def forget(self) -> None:
        """Let go of all sessions and of all that is known by name, as if the server had just started."""
        for session in self._loop.sessions:
            self._loop.preempt(session)
        self._pool.forget()
        self._loop.wake()

    def check_inputs(self, tensors: Tensors) -> None:
        """Raises `Refused` for what can be the inputs of no step. The others may wait: they are of a limited size."""
        self._validator.check_size(self._validator.inputs_of(tensors))

    async def step(
        self, session: SessionCache, request: Step, tensors: Tensors, *, rows: tuple[int, ...] | None = None
    ) -> Answer:
        """Append [B, T, D] inputs to a session and return the [B, T, D] outputs, or logits.

        First, what the session holds beyond the step's position is forgotten, and sequence i continues the one that was
        `rows[i]`. Raises `Refused`.
        """
        if session.preempted:
            raise preempted()
        inputs = self._validator.inputs_of(tensors)
        self._validator.check_step(
            request,
            inputs,
            rows=rows,
            num_tokens=session.num_tokens,
            batch_size=session.batch_size,
        )
        wanted = self._validator.logits_of(request, inputs, session.span)
        self._check_fits(inputs.batch_size, request.position + inputs.num_tokens)
        if not session.running and self._num_in_queue >= self._limits.queue_length:
            raise busy(f"{self._limits.queue_length} others wait for room in the cache")
        if session.cache is not None:
            session.cache = await self._rewound(session, request.position, rows)
            if session.preempted:  # meanwhile
                raise preempted()
        session.begin(request.position, rows, inputs)
        if inputs.num_tokens < HASH_ASIDE_TOKENS:
            session.name(inputs)
        else:
            await asyncio.to_thread(alone, lambda: session.name(inputs))
            if session.preempted:  # meanwhile
                raise preempted()
        return await self._loop.submit_step(session, inputs, wanted)

    async def _rewound(self, session: SessionCache, position: int, rows: tuple[int, ...] | None) -> BodyCache:
        """Transformers' cache, taken back to where a step begins. Raises `Refused` if its kind of state does not."""
        cache = session.cache
        if position == 0 or cache is None:
            return self._body.new_cache(session.span)

        @torch.inference_mode()
        def rewind() -> None:
            if position < session.num_tokens:
                cache.crop(position)
            if rows is not None:
                cache.select_rows(list(rows))

        try:
            await self._executor.run(rewind)
        except UnsupportedOperation as impossible:
            raise cannot_rewind(str(impossible)) from impossible
        return cache

    def _check_fits(self, batch_size: int, num_tokens: int) -> None:
        if batch_size * pages_for(num_tokens) > self._pool.num_pages:
            raise misrouted(
                f"{batch_size} sequences of {num_tokens} tokens can never fit into this server's cache of "
                f"{self._pool.num_pages * PAGE_TOKENS} tokens"
            )

    # -- single passes ------------------------------------------------------------------------------------------------

    async def forward(self, peer: str, request: Forward, tensors: Tensors) -> torch.Tensor:
        """The [B, T, D] outputs of a span. Raises `Refused`, and `MissingFromCache`."""
        blocks = self._blocks(peer, request, self._inputs_of(tensors))
        if request.keep is None:
            return await self._in_line(tensors, training.forward(blocks))
        kept = self._activations.new(blocks)
        outputs = await self._in_line(tensors, training.forward_to_keep(blocks, kept, self._activations.weights), kept)
        if kept.is_complete:
            self._activations.keep(peer, request.keep, kept)
        else:
            kept.drop()
        return outputs

    async def backward(self, peer: str, request: Backward, tensors: Tensors) -> training.Gradients:
        """The gradients of a span's inputs and factors. Raises `Refused`, and `MissingFromCache`."""
        span, grad = self._validator.span_of(request), tensors.get("grad")
        kept = None if request.kept is None else self._activations.take(peer, request.kept)
        if kept is None:
            if "hidden" not in tensors and request.kept is not None:
                raise MissingFromCache(kept=True)
            blocks = self._blocks(peer, request, self._inputs_of(tensors))
            kept = self._activations.new(blocks)
        blocks = kept.blocks
        if blocks.span != span:
            kept.drop()
            raise rejected(f"blocks {span} of a pass through {blocks.span}")
        if grad is None or grad.shape != blocks.inputs_BTD.shape or not grad.is_floating_point():
            kept.drop()
            raise rejected("a backward pass needs a gradient of its output's shape")
        learning = frozenset(blocks.adapters).difference(request.frozen)
        pieces = training.backward(
            blocks, grad, kept, self._activations.weights, inputs=request.inputs, learning=learning
        )
        return await self._in_line(tensors, pieces, kept)

    def _inputs_of(self, tensors: Tensors) -> StepInputs:
        inputs = self._validator.inputs_of(tensors)
        self._validator.check_pass(inputs)
        return inputs

    def _blocks(self, peer: str, request: Forward | Backward, inputs: StepInputs) -> PassBlocks:
        span = self._validator.span_of(request)
        adapters = self.adapters.of(peer, request, span)
        self._validator.check_factors(sum(len(adapter.parameters) for adapter in adapters.values()))
        return PassBlocks(self._body, span, inputs, adapters, request.seed)

    async def _in_line(self, tensors: Tensors, pieces: training.Pieces[T], kept: SavedActivations | None = None) -> T:
        try:
            with self._waiting(sum(tensor.nbytes for tensor in tensors.values())):
                return await self._loop.submit_pass(pieces)
        except BaseException:
            if kept is not None:
                kept.drop()
            raise

    @contextlib.contextmanager
    def _waiting(self, num_bytes: int) -> Iterator[None]:
        """Meanwhile, so much more waits. Raises `Refused` where too much does."""
        if self._waiting_bytes and self._waiting_bytes + num_bytes > self._limits.waiting_bytes:
            raise busy("too many passes are waiting")
        self._waiting_bytes += num_bytes
        try:
            yield
        finally:
            self._waiting_bytes -= num_bytes

    async def norms(self, request: Norms) -> torch.Tensor:
        """The norms [N] of rows of weights. Raises `Refused`."""
        (block,) = self._validator.span_of(request)
        self._validator.check_training()
        try:
            return await self._in_line({}, training.norms(self._body, block, request.modules))
        except ValueError as error:
            raise rejected(str(error)) from None

    def release(self, peer: str) -> None:
        """A client is gone: nothing of it is left."""
        self.adapters.release(peer)
        self._activations.release(peer)


def _names_of(request: Open, tensors: Tensors) -> list[list[bytes]]:
    """What a client says its sequences begin with, page by page. Raises `Refused` for names that are none."""
    digests = tensors.get("digests")
    if digests is None:
        return [[] for _ in range(request.batch_size)]
    if digests.dtype != torch.uint8 or digests.dim() != 3 or digests.shape[::2] != (request.batch_size, DIGEST_BYTES):
        raise rejected(f"digests must be uint8 of shape [batch, pages, {DIGEST_BYTES}]")
    if digests.shape[1] * PAGE_TOKENS > request.expected_length:
        raise rejected(f"digests of {digests.shape[1]} pages for a session of {request.expected_length} tokens")
    return [[bytes(name) for name in row.numpy()] for row in digests]
