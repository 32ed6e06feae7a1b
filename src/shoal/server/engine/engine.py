"""What a server computes: steps of sessions, with a cache, and single passes, without."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import torch

from shoal.adapters import adapter_cache_salt
from shoal.concurrency import background
from shoal.events import Observers
from shoal.ledgers.priorities import Priorities
from shoal.model.body import Body
from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_rules import PassRule, fair
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.prefix import PAGE_TOKENS
from shoal.protocol import MAX_PAYLOAD_BYTES, Adapter, Open, Step
from shoal.server.device_memory import or_busy
from shoal.server.engine.adapter_turns import AdapterTurns
from shoal.server.engine.cpu_turns import CpuTurns
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.model_runner import ModelRunner
from shoal.server.engine.single_passes import SinglePasses
from shoal.server.engine.validator import RequestValidator
from shoal.server.executor import Executor, alone
from shoal.server.kv.batch import Pass
from shoal.server.kv.output_head import Answer, ServerHead
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.pages import PagePool, pages_for
from shoal.server.kv.session_cache import SessionCache
from shoal.server.kv.states import SlotPool
from shoal.server.refusals import Refused, busy, cannot_rewind, misrouted, preempted
from shoal.server.speed_watch import Speeds, Watch
from shoal.server.step_inputs import StepInputs, Tensors
from shoal.server.training.adapter_store import AdapterStore
from shoal.spans import Span

HASH_ASIDE_TOKENS = 64
"""From this many tokens on, a step's pages are named on another thread: the event loop should not wait for that."""


class Engine:
    """Computes one span of one model for all clients, as long as `running()` is entered.

    `cache` is the memory that `compute` works on.
    """

    def __init__(
        self,
        body: Body,
        executor: Executor,
        validator: RequestValidator,
        *,
        compute: Pass,
        cache: PagedCache,
        num_pages: int,
        cpu_turns: CpuTurns | None,
        pass_time: PassTimeModel,
        limits: Limits,
        rule: PassRule = fair,
        head: ServerHead | None = None,
        watch: Watch | None = None,
        observers: Observers | None = None,
        priorities: Priorities | None = None,
    ) -> None:
        self.observers = observers or Observers()
        self.priorities = priorities or Priorities()
        self.validator = validator
        self._body = body
        self.executor = executor
        self._cache = cache
        self._limits = limits
        self._pool = PagePool(num_pages)
        # A step-by-step family computes what follows a snapshot token by token: that takes longer than all at once.
        self._slots = SlotPool(self._pool, cache.state_pages, with_snapshots=not body.family.step_by_step)
        self._watch = watch
        runner = ModelRunner(compute, executor, head=head, cpu_turns=cpu_turns)
        self._loop = EngineLoop(
            runner,
            self._pool,
            pass_time=pass_time,
            limits=limits,
            rule=rule,
            watch=watch,
            observers=self.observers,
            weight_of=self.priorities.weight_of,
        )
        self.passes = SinglePasses(body, validator, self._loop, limits)
        self._adapter_turns = AdapterTurns(self._loop)
        self._num_opened = itertools.count()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this is entered, steps and passes are computed."""
        async with background(self._loop.run(), name="shoal-engine"):
            yield

    @property
    def span(self) -> Span:
        """The blocks that are computed here."""
        return self._body.span

    @property
    def adapters(self) -> AdapterStore:
        """The adapters of clients and of the operator."""
        return self.passes.adapters

    @property
    def speeds(self) -> Speeds | None:
        """How fast the server is, in tokens per second, as far as that is known."""
        return None if self._watch is None else self._watch.speeds

    def forget_speeds_seen(self) -> None:
        """What the latest passes have shown no longer counts against the announced speeds."""
        if self._watch is not None:
            self._watch.forget()

    @property
    def cache_tokens(self) -> int:
        """For how many tokens of sessions there is room in all."""
        return self._pool.num_pages * PAGE_TOKENS

    @property
    def cache_tokens_left(self) -> int:
        """For how many more tokens there is room."""
        return self._pool.num_available * PAGE_TOKENS

    @property
    def num_sessions(self) -> int:
        """How many sessions are open."""
        return len(self._loop.sessions)

    @property
    def queue_length(self) -> int:
        """How many steps and passes wait, for their turn or for pages."""
        return len(self._loop.steps) + len(self._loop.passes)

    @property
    def num_passes(self) -> int:
        """How many passes were computed so far. A client that waits sees by it that the server works."""
        return self._loop.num_passes

    @property
    def _num_in_queue(self) -> int:
        return sum(not step.session.running for step in self._loop.steps)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every page is held or available. To be called between passes."""
        self._pool.check_integrity(
            page for session in self._loop.sessions for page in (*session.pages, *session.state_pages)
        )

    # -- sessions -----------------------------------------------------------------------------------------------------

    async def store_adapter(self, peer: str, request: Adapter, tensors: Tensors, *, payer: str) -> str:
        """Hold an adapter that a client sends, when `payer` has a turn. Returns its name. Raises `Refused`."""
        async with self._adapter_turns.turn(payer):
            return await self.adapters.store(peer, request, tensors)

    def open(
        self, peer: str, request: Open, tensors: Tensors, *, payer: str | None = None
    ) -> tuple[SessionCache, torch.Tensor | None]:
        """A new session, and the outputs [B, T, D] of its first tokens that were computed before, if any.

        Its pages and its time count for `payer`, or for the peer. Raises `Refused`, and `MissingFromCache`.
        """
        span = self.validator.span_of(request)
        adapters = self.adapters.of(peer, request, span)
        self.validator.check_length(request)
        self._check_fits(request.batch_size, request.expected_length)
        names = self.validator.page_names_of(request, tensors)
        session = SessionCache(
            self._pool,
            span,
            opened=next(self._num_opened),
            peer=peer,
            batch_size=request.batch_size,
            salt=adapter_cache_salt(request.salt, request.adapters),
            adapters=adapters,
            slots=self._slots,
            payer=payer,
        )
        self._loop.join(session)
        token_bytes = request.batch_size * self.validator.hidden_size * 4
        session.adopt(names, max_pages=MAX_PAYLOAD_BYTES // 2 // (token_bytes * PAGE_TOKENS))
        if not session.num_tokens:
            return session, None
        try:
            return session, or_busy(lambda: self._outputs_of(session))
        except Refused:
            self.close(session)
            raise

    def _outputs_of(self, session: SessionCache) -> torch.Tensor:
        return torch.stack([self._cache.read_outputs(row.pages) for row in session.rows]).cpu()

    def close(self, session: SessionCache) -> None:
        """Release a session's pages. May be called twice."""
        session.release()
        self._loop.sessions.discard(session)
        self._loop.wake()

    def forget(self) -> None:
        """Preempt all sessions and forget all named pages, as if the server had just started."""
        for session in self._loop.sessions:
            self._loop.preempt(session)
        self._pool.reset_prefixes()
        self._loop.wake()

    async def step(
        self, session: SessionCache, request: Step, inputs: StepInputs, *, rows: tuple[int, ...] | None = None
    ) -> Answer:
        """Append [B, T, D] inputs to a session and return the [B, T, D] outputs, or logits.

        First, what the session holds beyond the step's position is forgotten, and sequence i continues the one that was
        `rows[i]`. Raises `Refused`.
        """
        if session.preempted:
            raise preempted()
        self.validator.check_step(
            request,
            inputs,
            rows=rows,
            num_tokens=session.num_tokens,
            batch_size=session.batch_size,
        )
        wanted = self.validator.logits_of(request, inputs, session.span)
        self._check_fits(inputs.batch_size, request.position + inputs.num_tokens)
        if not session.running and self._num_in_queue >= self._limits.queue_length:
            raise busy(f"{self._limits.queue_length} others wait for room in the cache")
        if session.has_states and 0 < request.position < session.num_tokens:
            raise cannot_rewind("the states of this model's blocks cannot go back")
        session.begin_step(request.position, rows, inputs)
        if inputs.num_tokens < HASH_ASIDE_TOKENS:
            session.append_inputs(inputs)
        else:
            await asyncio.to_thread(alone, lambda: session.append_inputs(inputs))
            if session.preempted:  # meanwhile
                raise preempted()
        return await self._loop.submit_step(session, inputs, wanted)

    def _check_fits(self, batch_size: int, num_tokens: int) -> None:
        if batch_size * (pages_for(num_tokens) + self._slots.pages_each) > self._pool.num_pages:
            raise misrouted(
                f"{batch_size} sequences of {num_tokens} tokens can never fit into this server's cache of "
                f"{self._pool.num_pages * PAGE_TOKENS} tokens"
            )
