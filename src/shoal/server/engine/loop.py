"""Who computes next: one task plans and computes a pass at a time, and training in between.

Everybody else only adds to what is waiting. Pages change hands on the event loop between passes; tensors are touched on
the compute thread during them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from shoal.policy.preemption import Holder, gives_way, makes_room
from shoal.policy.scheduling import PassTimeModel, SchedulerOutput, batching_delay, is_training_due, schedule
from shoal.server.engine.cpu_turns import CpuTurns, turn_of
from shoal.server.engine.engine_limits import Limits
from shoal.server.engine.requests import PassRequest, StepRequest, settle
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.output_head import Answer, ServerHead, answers_of
from shoal.server.kv.pages import PagePool
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import busy, preempted
from shoal.server.speed_watch import Watch
from shoal.server.step_inputs import StepInputs, WantedLogits
from shoal.server.training.block_passes import Pieces

log = logging.getLogger(__name__)
T = TypeVar("T")

RECHECK_SECONDS = 0.003
"""After so long it is looked at again whether waiting for others is still right."""
LOOK_SECONDS = 1.0
"""After so long it is looked at again whether others rest meanwhile, whose pages are wanted."""
RECENTLY_DECODED_SECONDS = 0.5
"""Sessions that got a token so lately are thought to be decoding still, although nothing of them waits just now."""


class EngineLoop:
    """Gives the compute thread to what waits."""

    def __init__(
        self,
        compute: Pass,
        executor: Executor,
        pool: PagePool,
        *,
        cpu_turns: CpuTurns | None = None,
        head: ServerHead | None = None,
        pass_time: PassTimeModel,
        limits: Limits,
        watch: Watch | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.sessions: set[SessionCache] = set()
        self.num_passes = 0
        self._steps: list[StepRequest] = []
        self._passes: list[PassRequest[Any]] = []
        self.pass_time = pass_time
        self._compute = compute
        self._head = head
        self._executor = executor
        self._pool = pool
        self._cpu_turns = cpu_turns
        self._limits = limits
        self._watch = watch
        self._clock = clock or asyncio.get_running_loop().time
        self._news = asyncio.Event()
        self._decoded_at = float("-inf")
        self._inference_seconds = self._training_seconds = 0.0  # of the time for which both were waiting

    def join(self, session: SessionCache) -> None:
        """A session is opened. It may hold pages already, which were known."""
        session.used_at = session.began_at = self._clock()
        self.sessions.add(session)

    async def submit_step(
        self, session: SessionCache, inputs: StepInputs, wanted: WantedLogits | None = None
    ) -> Answer:
        """The outputs [B, T, D] of a session's next tokens, or the logits that are wanted.

        Raises `Refused` if there is no room for them for long.
        """
        step = StepRequest(session, inputs, wanted, arrived_at=self._clock())
        session.used_at = step.arrived_at
        session.arrives(step.arrived_at, decodes=step.view().decodes)
        self._steps.append(step)
        self.wake()
        timer = asyncio.get_running_loop().call_later(self._limits.queue_seconds, self._give_up, step)
        try:
            return await step.result
        finally:
            timer.cancel()

    async def submit_pass(self, pieces: Pieces[T]) -> T:
        """The outcome of a single pass."""
        work = PassRequest(pieces)
        self._passes.append(work)
        self.wake()
        return await work.result

    def wake(self) -> None:
        """Something has changed: there may be more to do, or room for what waits."""
        self._news.set()

    @property
    def steps(self) -> list[StepRequest]:
        """Those that wait: not those whose client is gone meanwhile."""
        self._steps = [step for step in self._steps if not step.result.done()]
        return self._steps

    @property
    def passes(self) -> list[PassRequest[Any]]:
        """The same of single passes."""
        self._passes = [work for work in self._passes if not work.result.done()]
        return self._passes

    def _give_up(self, step: StepRequest) -> None:
        if not step.session.running:
            settle(step.result, busy(f"no room in the cache for {self._limits.queue_seconds:g} s"))

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Compute whatever waits, for ever."""
        while True:
            self._news.clear()
            try:
                if not await self._iterate():
                    await self._something_new()
            except Exception as error:  # ours: whoever waits is told, and the server goes on for those who come
                log.exception("the engine failed")
                for step in self.steps:
                    settle(step.result, error)
                for work in self.passes:
                    settle(work.result, error)

    async def _iterate(self) -> bool:
        """Compute one pass, or one piece of training. Returns whether there was anything to do."""
        both = bool(self.passes) and (bool(self.steps) or self._is_decoding)
        began = self._clock()
        due = is_training_due(
            inference_seconds=self._inference_seconds,
            training_seconds=self._training_seconds,
            share=self._limits.training,
        )
        if not (both and due) and await self._run_inference():
            self._inference_seconds += both * (self._clock() - began)
        elif self.passes:
            if both and not due and (wait := self._seconds_to_next(self.pass_time.decode_seconds)):
                await self._news_within(wait)  # a piece may take longer than those who decode would like
                return True
            await self._run_training()
            self._training_seconds += (both and due) * (self._clock() - began)  # else nobody else could use the time
        else:
            return False
        return True

    async def _something_new(self) -> None:
        """Until there is news, or it is time to look whether those who wait for pages may have some now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS if self.steps else None):
                await self._news.wait()

    def _seconds_to_next(self, within: float) -> float:
        """How soon somebody who decodes is expected, if that is `within` so many seconds."""
        now = self._clock()
        waits = [each.expected_at - now for each in self.sessions if each.expected_at is not None]
        return min((wait for wait in waits if 0 < wait < within), default=0.0)

    async def _run_training(self) -> None:
        work = self.passes[0]
        self.num_passes += 1
        outcome: Any
        try:
            async with turn_of(self._cpu_turns):
                outcome = await self._executor.run(work.advance)
        except Exception as error:
            outcome = error
        if outcome is not None:
            settle(work.result, outcome)

    async def _run_inference(self) -> bool:
        if not self.steps:
            return False
        while True:
            while wait := self._batching_delay():
                await self._news_within(min(wait, RECHECK_SECONDS))
            async with turn_of(self._cpu_turns):
                if not self._batching_delay():  # those who have come while others had their turn may expect more
                    return await self._schedule_pass()

    async def _schedule_pass(self) -> bool:
        while True:
            steps = self._in_order()
            plan = schedule(
                [step.view() for step in steps],
                num_free_pages=self._pool.num_available,
                max_num_batched_tokens=self._limits.max_num_batched_tokens,
                prefill_tokens=self._prefill_tokens(),
            )
            yielding = self._yielding(steps, plan)
            if yielding is None:
                break
            log.info("a session of %d tokens gives its pages to others", yielding.num_tokens)
            self.preempt(yielding)
        if not plan.chunks:
            return False
        await self._pass([(steps[index], num_tokens) for index, num_tokens in plan.chunks])
        return True

    def _batching_delay(self) -> float:
        """For how long the steps that are ready should wait for others that will come in a moment.

        Prefills without company wait for it where another server of this machine would have to wait for them.
        """
        contended = self._cpu_turns is not None and self._cpu_turns.contended
        ready = [step.session for step in self.steps if step.view().decodes]
        if not ready:
            return self._seconds_to_next(4 * self.pass_time.decode_seconds) if contended and self._is_decoding else 0.0
        here = {step.session for step in self.steps}
        expected = [each.expected_at for each in self.sessions - here if each.expected_at is not None]
        seconds = self.pass_time.decode_seconds
        if contended:
            seconds *= 2  # whoever misses this pass waits for other servers' passes too
        return batching_delay(expected, num_ready=len(ready), now=self._clock(), pass_seconds=seconds)

    async def _news_within(self, seconds: float) -> None:
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def _prefill_tokens(self) -> int:
        """How many tokens of prefills the next pass may have, so that those who decode do not wait for them."""
        if not self._is_decoding:
            return self._limits.max_num_batched_tokens
        return self.pass_time.prefill_tokens(self._limits.prefill)

    @property
    def _is_decoding(self) -> bool:
        """Whether somebody decodes, although nothing of it may wait just now."""
        return self._clock() - self._decoded_at < max(RECENTLY_DECODED_SECONDS, 4 * self.pass_time.decode_seconds)

    def _in_order(self) -> list[StepRequest]:
        """The steps as they came, but those that are still to begin come after others whose peers hold less."""
        if sum(not step.session.running for step in self.steps) < 2:
            return self._steps
        held = Counter[str]()
        for session in self.sessions:
            held[session.peer] += len(session.pages)
        return sorted(self.steps, key=lambda step: 0 if step.session.running else held[step.session.peer])

    def _yielding(self, steps: Sequence[StepRequest], plan: SchedulerOutput) -> SessionCache | None:
        """The session that gives its pages up before there is a pass, if one has to or should.

        Its client brings everything again, here or elsewhere. It may have been given pages that were known, and not be
        heard of since.
        """
        if not plan.short_of_pages and plan.kept_out is None:
            return None
        sessions = [session for session in self.sessions if session.pages]
        at_work = {step.session for step in steps}
        holders = [
            Holder(
                session.peer,
                len(set(session.pages)),
                used_at=session.used_at,
                began_at=session.began_at,
                opened=session.opened,
                at_work=session in at_work,
            )
            for session in sessions
        ]
        now = self._clock()
        if plan.short_of_pages:
            return sessions[gives_way(holders, now=now)]
        assert plan.kept_out is not None
        index, num_missing = plan.kept_out
        step = steps[index]
        others = [number for number, session in enumerate(sessions) if session is not step.session]
        found = makes_room(
            [holders[number] for number in others],
            peer=step.session.peer,
            num_pages=step.view().num_pages(step.num_left),
            num_missing=num_missing,
            waited=now - step.arrived_at,
            now=now,
        )
        return None if found is None else sessions[others[found]]

    def preempt(self, session: SessionCache) -> None:
        """A session gives up its pages, and whoever waits for its steps is told."""
        session.preempt()
        for step in self.steps:
            if step.session is session:
                settle(step.result, preempted())

    async def _pass(self, chosen: Sequence[tuple[StepRequest, int]]) -> None:
        decoding = [step for step, _ in chosen if step.view().decodes]
        num_prefill = sum(tokens * len(step.session.rows) for step, tokens in chosen if step not in decoding)
        began = self._clock()
        for step, _ in chosen:
            if not step.session.running:
                step.session.began_at = began
        chunks = [step.chunk(num_tokens) for step, num_tokens in chosen]
        answers = await self._executor.run(lambda: self._computed(chunks))
        self.num_passes += 1
        now = self._clock()
        self.pass_time = self.pass_time.updated(num_prefill_tokens=num_prefill, seconds=now - began)
        if self._watch is not None and not any(isinstance(answer, Exception) for answer in answers):
            if not num_prefill:
                self._watch.decoded(chunks, now - began, now=now)
            elif not decoding:
                self._watch.prefilled(chunks, now - began, now=now)
        if decoding:
            self._decoded_at = now
        for (step, num_tokens), answer in zip(chosen, answers, strict=True):
            step.session.used_at = now
            if isinstance(answer, Exception):
                settle(step.result, answer)
            else:
                step.advance(num_tokens, answer)

    def _computed(self, chunks: Sequence[Chunk]) -> list[Answer | Exception]:
        """What is answered to each chunk."""
        try:
            return answers_of(self._head, self._compute(chunks), chunks)
        except Exception as error:
            return [error] * len(chunks)
