"""The simulated server and the live engine's loop compute the same passes at the same times.

The live side is the real `EngineLoop`, its pages and its sessions with their names of pages, in virtual time. Only the
model is missing: a pass sleeps for as long as the simulated one takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_rules import RULES, PassRule
from shoal.prefix import PAGE_TOKENS, page_hashes, root_hash
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.model_runner import ModelRunner
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk
from shoal.server.kv.pages import PagePool
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import RETRY_SECONDS, Refused, busy, preempted
from shoal.server.step_inputs import StepInputs
from shoal.simulator.serving import page_counts
from shoal.simulator.serving.generating import serve
from shoal.simulator.serving.generations import Generation, Lengths, Workload, generations
from shoal.simulator.serving.one_server import PassRecord
from shoal.simulator.serving.server_setup import Part, ServerSetup
from shoal.spans import Span

from .virtual_time import run

T = TypeVar("T")
SPAN = Span(0, 1)
SHORT = Workload(Lengths(50.0, 0.9, 200), Lengths(40.0, 0.9, 120))
ROUNDING = 1e-9
"""Seconds: both sides add up the same numbers in another order."""


class Sleeping(Executor):
    """Computes at once, and takes the time that the pass takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def run(self, function: Callable[[], T]) -> T:
        outcome = function()
        await asyncio.sleep(self.seconds)
        return outcome


class LiveServer:
    """The live loop, and clients that do what the simulated ones do."""

    def __init__(self, setup: ServerSetup, rule: PassRule) -> None:
        self.passes: list[PassRecord] = []
        self.ends: dict[int, float] = {}
        self.pool = PagePool(setup.num_pages)
        self._setup = setup
        self._executor = Sleeping()
        self._num_opened = 0
        self.loop = EngineLoop(
            ModelRunner(self._compute, self._executor),
            self.pool,
            pass_time=setup.pass_time,
            limits=setup.limits,
            rule=rule,
        )

    def _compute(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        sizes = [chunk.hidden_BTD.shape[1] for chunk in chunks]
        parts = [Part(size, chunk.num_computed_tokens) for size, chunk in zip(sizes, chunks, strict=True)]
        self._executor.seconds = self._setup.seconds_of(parts)
        jobs = [int(chunk.hidden_BTD[0, 0, 0]) for chunk in chunks]
        began_at = asyncio.get_running_loop().time()
        self.passes.append(PassRecord(began_at, self._executor.seconds, tuple(zip(jobs, sizes, strict=True))))
        return [chunk.hidden_BTD for chunk in chunks]

    async def generate(self, job: Generation) -> None:
        await asyncio.sleep(job.arrives_at)
        away, num_answered = job.seconds_away(), 0
        session: SessionCache | None = None
        while num_answered < job.num_answer:
            num_inputs = job.num_prompt + num_answered
            session = session or self._open(job, num_inputs)
            try:
                await self._step(session, job, num_inputs - session.num_tokens)
            except Refused:
                self._close(session)
                session = None
                await asyncio.sleep(self._setup.retry_seconds)
                continue
            num_answered += 1
            self.ends[job.number] = asyncio.get_running_loop().time()
            await asyncio.sleep(next(away))
        assert session is not None
        self._close(session)

    def _open(self, job: Generation, num_inputs: int) -> SessionCache:
        session = SessionCache(self.pool, SPAN, opened=self._num_opened, peer=job.peer, salt="", batch_size=1)
        self._num_opened += 1
        self.loop.join(session)
        names = page_hashes(root_hash(SPAN, ""), _hidden(job, num_inputs)[0], torch.arange(num_inputs))
        session.adopt([names], max_pages=1 << 20)
        return session

    async def _step(self, session: SessionCache, job: Generation, num_tokens: int) -> None:
        """As `shoal.server.engine.engine.Engine.step`."""
        if session.preempted:
            raise preempted()
        num_waiting = sum(not step.session.running for step in self.loop.steps)
        if not session.running and num_waiting >= self._setup.limits.queue_length:
            raise busy("others wait")
        inputs = StepInputs(_hidden(job, num_tokens), None, None)
        session.begin_step(session.num_tokens, None, inputs)
        session.append_inputs(inputs)
        await self.loop.submit_step(session, inputs)

    def _close(self, session: SessionCache) -> None:
        """As `shoal.server.engine.engine.Engine.close`."""
        session.release()
        self.loop.sessions.discard(session)
        self.loop.wake()


def _hidden(job: Generation, num_tokens: int) -> torch.Tensor:
    return torch.full((1, num_tokens, 1), float(job.number))


def live(jobs: Sequence[Generation], setup: ServerSetup, rule: PassRule) -> LiveServer:
    async def play() -> LiveServer:
        server = LiveServer(setup, rule)
        looping = asyncio.create_task(server.loop.run())
        await asyncio.gather(*(server.generate(job) for job in jobs))
        looping.cancel()
        server.pool.check_integrity([])
        return server

    return run(play())


SMALL = ServerSetup(num_pages=24)
SETUPS = {
    "room for all": (replace(SMALL, num_pages=1000), 3.0),
    "too little room": (SMALL, 6.0),
    "a short queue": (replace(SMALL, limits=Limits(queue_length=4)), 6.0),
    "impatient": (replace(SMALL, limits=Limits(queue_seconds=3.0)), 6.0),
    "short passes, long attention": (replace(SMALL, pass_seconds=0.004, token_seconds=2e-4, pair_seconds=3e-5), 6.0),
    "small prefills": (replace(SMALL, limits=Limits(prefill=0.2, max_num_batched_tokens=128)), 6.0),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("name", SETUPS)
def test_the_simulated_server_computes_the_passes_of_the_live_engine(name: str, rule: PassRule):
    setup, rate = SETUPS[name]
    jobs = generations(SHORT, 50, rate=rate, seed=len(name))
    passes: list[PassRecord] = []
    served = serve(jobs, setup, rule, on_pass=passes.append)
    engine = live(jobs, setup, rule)
    assert [each.parts for each in engine.passes] == [each.parts for each in passes]
    assert [each.began_at for each in engine.passes] == pytest.approx([each.began_at for each in passes], abs=ROUNDING)
    ends = {one.job.number: one.ended_at for one in served.completed}
    assert engine.ends == pytest.approx(ends, abs=ROUNDING)
    assert (served.num_preempted > 0) == (name != "room for all")
    assert (served.num_busy > 0) == (name != "room for all")


def test_one_client_with_several_sessions_is_simulated_too():
    jobs = [replace(job, peer=f"client {job.number % 3}") for job in generations(SHORT, 25, rate=6.0, seed=5)]
    for rule in RULES.values():
        passes: list[PassRecord] = []
        assert serve(jobs, SMALL, rule, on_pass=passes.append).num_preempted > 0
        assert [each.parts for each in live(jobs, SMALL, rule).passes] == [each.parts for each in passes]


def test_the_constants_that_the_simulator_does_not_import_are_those_of_the_live_server():
    assert page_counts.PAGE_TOKENS == PAGE_TOKENS
    assert ServerSetup().retry_seconds == RETRY_SECONDS
