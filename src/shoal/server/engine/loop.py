"""The engine's loop: one task that chooses and computes a pass at a time, and pieces of training in between.

All other tasks only add to what waits. Pages change hands on the event loop, between passes; tensors are touched on the
compute thread, during them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from shoal.events import Observers
from shoal.policy.batching.compute_account import ComputeAccount, client_weights
from shoal.policy.batching.engine_limits import RECENTLY_DECODED_SECONDS, RECHECK_SECONDS, Limits
from shoal.policy.batching.pass_rules import PassRule, Places, fair
from shoal.policy.batching.pass_shares import PassShares, Sharing, idle_seconds
from shoal.policy.batching.pass_size import PassSize
from shoal.policy.batching.pass_times import PassLoad, PassTimeModel
from shoal.policy.batching.scheduling import batching_delay, seconds_to_next, shortest_prefill_seconds
from shoal.policy.batching.session_times import SessionTimes
from shoal.server.engine.model_runner import ModelRunner, pass_computed
from shoal.server.engine.page_holders import drop_snapshots_if_short, engine_view, holding_pages
from shoal.server.engine.request_queue import RequestQueue
from shoal.server.engine.requests import PassRequest, StepRequest, settle
from shoal.server.engine.time_shares import TimeShares
from shoal.server.kv.output_head import Answer
from shoal.server.kv.pages import PagePool
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import busy, preempted, too_many
from shoal.server.speed_watch import Watch
from shoal.server.step_inputs import StepInputs, WantedLogits
from shoal.server.training.block_passes import Pieces

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineLoop:
    """Gives the compute thread to the steps and the passes that wait.

    `clock` tells seconds, and `weight_of` the weight of a payer (`shoal.policy.contribution.priority`).
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: PagePool,
        *,
        pass_time: PassTimeModel,
        limits: Limits,
        rule: PassRule = fair,
        watch: Watch | None = None,
        observers: Observers | None = None,
        clock: Callable[[], float] | None = None,
        weight_of: Callable[[str], float] = lambda payer: 1.0,
    ) -> None:
        self.sessions: set[SessionCache] = set()
        self.num_passes = 0
        self._queue = RequestQueue()
        self._runner = runner
        self._pool = pool
        self._limits = limits
        self._pass_size = PassSize.unlimited(limits.max_num_batched_tokens)
        self._rule = rule
        self._places = Places()
        self._watch = watch
        self._observers = observers or Observers()
        self._clock = clock or asyncio.get_running_loop().time
        self._weight_of = weight_of
        self._pass_time = pass_time
        self._account = ComputeAccount()
        self._time_shares = TimeShares()

    # -- what the engine adds -----------------------------------------------------------------------------------------

    def join(self, session: SessionCache) -> None:
        """Add a session that has been opened. It may hold pages already, which the server had computed before."""
        session.times = SessionTimes.opened(self._clock())
        self.sessions.add(session)

    async def submit_step(
        self, session: SessionCache, inputs: StepInputs, wanted: WantedLogits | None = None
    ) -> Answer:
        """The outputs [B, T, D] of a session's next tokens, or the logits that are wanted.

        Raises `Refused` when the step has waited too long for pages, or the session was preempted.
        """
        step = StepRequest(session, inputs, wanted, arrived_at=self._clock())
        since = None
        if not session.running:
            since = self._places.of(session.peer, step.arrived_at)
            self._places = self._places.taken(session.peer)
        session.times = session.times.after_arrival(step.arrived_at, decodes=step.view().decodes, since=since)
        self._queue.add_step(step)
        timer = asyncio.get_running_loop().call_later(self._limits.queue_seconds, self._give_up, step)
        try:
            return await step.result
        finally:
            timer.cancel()
            del step  # the traceback of its error has this frame: a circle, which would keep its inputs

    async def submit_pass(self, pieces: Pieces[T], payer: str = "") -> T:
        """The outcome of a single pass, which is computed piece by piece and counts for `payer`.

        Raises what its pieces raise, and `Refused` while too many passes of the payer wait.
        """
        if sum(request.payer == payer for request in self.passes) >= self._limits.queued_passes:
            raise too_many(f"{self._limits.queued_passes} passes", payer)
        request = PassRequest(pieces, payer)
        self._queue.add_pass(request)
        return await request.result

    def charge(self, payer: str, seconds: float) -> None:
        """Work for a payer beside the compute thread has taken so long. It owes that to others that compute now."""
        if self.others_than(payer):
            self._account = self._account.after_aside(payer, seconds, present=self._present())

    def others_than(self, payer: str) -> Collection[str]:
        """The other payers that want to have something computed now, or decode."""
        return (self._present() | {request.payer for request in self.passes}) - {payer}

    def wake(self) -> None:
        """Something has changed: there may be more to compute, or room for steps that wait."""
        self._queue.wake()

    def preempt(self, session: SessionCache) -> None:
        """Take a session's pages away, and refuse its steps that wait."""
        self._places = self._places.told_to_come_back(session.peer, since=session.times.since, now=self._clock())
        session.preempt()
        for step in self.steps:
            if step.session is session:
                settle(step.result, preempted())

    @property
    def steps(self) -> list[StepRequest]:
        """The steps that wait or are computed, but for those whose caller is gone."""
        return self._queue.steps

    @property
    def passes(self) -> list[PassRequest[Any]]:
        """The single passes that wait or are computed, but for those whose caller is gone."""
        return self._queue.passes

    def _give_up(self, step: StepRequest) -> None:
        session = step.session
        if not session.running:
            now = self._clock()
            self._places = self._places.told_to_come_back(session.peer, since=session.times.since, now=now)
            settle(step.result, busy(f"no room in the cache for {self._limits.queue_seconds:g} s"))

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Compute what waits, until the task is cancelled."""
        while True:
            self._queue.forget_news()
            try:
                if not await self._iterate():
                    await self._rest()
            except Exception as error:  # a defect of ours: all callers are told, and the server goes on
                log.exception("the engine failed")
                self._queue.fail(error)

    async def _iterate(self) -> bool:
        """Compute one pass, or one piece of training. Returns whether there was anything to do."""
        both = bool(self.passes) and (bool(self.steps) or self._is_decoding)
        began = self._clock()
        is_due = self._time_shares.is_training_due(self._limits.training)
        if not (both and is_due) and await self._run_inference():
            if both:
                self._time_shares = self._time_shares.after_inference(self._clock() - began)
        elif self.passes:
            request = self._next_pass()
            if both and not is_due and (wait := self._delay_before(request)):
                await self._news_within(wait)  # a piece may take longer than a decoding session should wait
                if self._present() - {request.payer}:
                    self._time_shares = self._time_shares.after_inference(self._clock() - began)
                return True
            await self._run_training(request)
            delayed_others = both and any(step.session.payer != request.payer for step in self.steps)
            self._account = self._account.after_piece(
                request.payer,
                self._clock() - began,
                delayed_others=delayed_others,
                present=self._present(),
                queued=self._queued(),
                now=self._clock(),
            )
            if both and (is_due or delayed_others):  # otherwise inference had no use for the time
                self._time_shares = self._time_shares.after_training(self._clock() - began)
        else:
            return False
        return True

    async def _rest(self) -> None:
        """Wait until there may be something to compute."""
        began = self._clock()
        await self._queue.wait_for_news(idle_seconds(self._account.debts) if self.steps else None)
        self._account = self._account.after_waiting(self._clock() - began, present=self._present())

    def _next_pass(self) -> PassRequest[Any]:
        """The first of the passes whose payers have used least."""
        payers = {request.payer for request in self.passes}
        self._account = self._account.weighing(self._weight_of, payers | self._present())
        return min(self.passes, key=lambda request: self._account.used.turn_of(request.payer, payers))

    async def _news_within(self, seconds: float) -> None:
        self._queue.forget_news()
        await self._queue.wait_for_news(seconds)

    async def _run_training(self, request: PassRequest[Any]) -> None:
        self.num_passes += 1
        outcome: Any
        try:
            async with self._runner.turn():
                outcome = await self._runner.advance(request)
        except Exception as error:
            outcome = error
        if outcome is not None:
            settle(request.result, outcome)

    async def _run_inference(self) -> bool:
        if not self.steps:
            return False
        while True:
            while wait := self._batching_delay():
                await self._news_within(min(wait, RECHECK_SECONDS))
            async with self._runner.turn():
                if not self._batching_delay():  # steps that came during another server's turn may expect more
                    return await self._schedule_pass()

    async def _schedule_pass(self) -> bool:
        drop_snapshots_if_short(self.steps, self._pool)
        while True:
            steps, holding = self.steps, holding_pages(self.sessions)
            view = engine_view(
                steps,
                holding,
                self._pool,
                limits=self._pass_size.applied_to(self._limits),
                pass_time=self._pass_time,
                is_decoding=self._is_decoding,
                next_in=self._seconds_to_next(),
                sharing=self._sharing(steps),
                now=self._clock(),
            )
            choice = self._rule(view)
            if choice.preempted is None:
                break
            yielding = holding[choice.preempted]
            log.info("a session of %d tokens gives its pages to others", yielding.num_tokens)
            self.preempt(yielding)
        if not choice.chunks:
            return False
        await self._run_pass([(steps[index], num_tokens) for index, num_tokens in choice.chunks], choice.shares)
        return True

    async def _run_pass(self, chosen: Sequence[tuple[StepRequest, int]], shares: PassShares) -> None:
        """Compute one pass: of each step, the number of tokens of every row that stands beside it."""
        parts = [(step.session.payer, step.view().work(num_tokens)) for step, num_tokens in chosen]
        work, present = PassLoad.total(part for _, part in parts), self._present()
        began = self._clock()
        for step, _ in chosen:
            if not step.session.running:
                step.session.times = step.session.times.after_admission(began)
        chunks = [step.chunk(num_tokens) for step, num_tokens in chosen]
        outcome = await self._runner.run(chunks)
        answers, without_memory = outcome.answers, outcome.tokens_without_memory
        self.num_passes += 1
        self._resize_passes(without_memory)
        now = self._clock()
        self._account = self._account.after_pass(
            parts,
            now - began,
            shares=shares,
            pass_time=self._pass_time,
            present=present,
            queued=self._queued(),
            now=now,
            recently=self._recently,
        )
        if without_memory is None:
            self._pass_time = self._pass_time.learnt(work, now - began)
        self._observers.emit(pass_computed(chunks, now - began))
        is_undisturbed = without_memory is None and not any(isinstance(answer, Exception) for answer in answers)
        if self._watch is not None and is_undisturbed:
            if not work.num_prefill:
                self._watch.decoded(chunks, now - began, now=now)
            elif not work.num_decoding:
                self._watch.prefilled(chunks, now - began, now=now)
        for (step, num_tokens), answer in zip(chosen, answers, strict=True):
            if isinstance(answer, Exception):
                settle(step.result, answer)
            else:
                step.advance(num_tokens, answer)
            answered = not isinstance(answer, Exception) and not step.num_left
            step.session.times = step.session.times.after_pass(now, answered=answered)

    def _resize_passes(self, tokens_without_memory: int | None) -> None:
        if tokens_without_memory is None:
            self._pass_size = self._pass_size.after_pass()
            return
        self._pass_size = self._pass_size.after_out_of_memory(tokens_without_memory)
        told = "no memory for a pass of %d tokens; passes have at most %d now"
        log.warning(told, tokens_without_memory, self._pass_size.limit)

    # -- how long to wait --------------------------------------------------------------------------------------------

    def _batching_delay(self) -> float:
        """How many seconds the steps that are ready should wait for others that are expected soon.

        Prefills alone wait for a decoding step that would have to wait for them, and where another server of this
        machine would have to.
        """
        is_contended = self._runner.is_contended
        decode_seconds = self._pass_time.decode_seconds
        ready = [step.session for step in self.steps if step.view().decodes]
        if not ready:
            if not self._is_decoding:
                return 0.0
            least = shortest_prefill_seconds(self._pass_time, [step.view() for step in self.steps])
            return self._delay_within(max(least, 4 * decode_seconds) if is_contended else least)
        here = {step.session for step in self.steps}
        coming = [each for each in self.sessions - here if each.times.expected_at is not None]
        num_ready, weights = client_weights([each.payer for each in ready], [each.payer for each in coming])
        return batching_delay(
            [each.times.expected_at for each in coming if each.times.expected_at is not None],
            num_ready=num_ready,
            now=self._clock(),
            # A step that misses this pass waits for the passes of other servers too.
            pass_seconds=2 * decode_seconds if is_contended else decode_seconds,
            weights=weights,
        )

    def _delay_before(self, request: PassRequest[Any]) -> float:
        """How many seconds a piece of a single pass should wait, so that it does not delay a decoding step.

        Steps of other payers are not delayed by as long as its payer's pieces take.
        """
        seconds, next_in = self._pass_time.decode_seconds, self._seconds_to_next()
        if self._present() - {request.payer}:
            seconds = max(seconds, self._account.piece_seconds.get(request.payer, 0.0))
            if next_in is None:
                return RECHECK_SECONDS if seconds > self._pass_time.decode_seconds else 0.0
        return next_in if next_in is not None and next_in < seconds else 0.0

    def _delay_within(self, seconds: float) -> float:
        """In how many seconds the next decoding step is expected, if that is sooner than `seconds`; otherwise 0."""
        next_in = self._seconds_to_next()
        return next_in if next_in is not None and next_in < seconds else 0.0

    def _seconds_to_next(self) -> float | None:
        expected = [each.times.expected_at for each in self.sessions if each.times.expected_at is not None]
        return seconds_to_next(expected, now=self._clock())

    @property
    def _recently(self) -> float:
        return max(RECENTLY_DECODED_SECONDS, 4 * self._pass_time.decode_seconds)

    @property
    def _is_decoding(self) -> bool:
        """Whether sessions are decoding, although none of their steps may wait just now."""
        return bool(self._account.decoding(now=self._clock(), recently=self._recently))

    # -- for whom -----------------------------------------------------------------------------------------------------

    def _sharing(self, steps: Sequence[StepRequest]) -> Sharing:
        waiting = {step.session.payer for step in steps}
        away, next_in = self._present() - waiting, self._seconds_to_next()
        self._account = self._account.weighing(self._weight_of, away | waiting)
        return self._account.sharing(self._pass_time, away=away, next_in=next_in, waiting=waiting, now=self._clock())

    def _present(self) -> frozenset[str]:
        """The payers whose steps wait, or that decoded a moment ago: their next texts may begin any time."""
        decoding = self._account.decoding(now=self._clock(), recently=self._recently)
        return decoding | {step.session.payer for step in self.steps}

    def _queued(self) -> set[str]:
        """The payers with work that takes turns: prompts and single passes."""
        prompts = {step.session.payer for step in self.steps if not step.view().decodes}
        return prompts | {request.payer for request in self.passes}
