"""An idle server times passes of its own, and corrects a speed from a bad moment. In virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from shoal.concurrency import background
from shoal.protocol import Open, Step
from shoal.server.engine.engine import Engine
from shoal.server.engine.idle_timing import EVERY_SECONDS, IDLE_SECONDS, time_when_idle
from shoal.server.speed_watch import MEASURED_PREFILL_TOKENS, Speeds, Watch
from shoal.spans import Span

from .schedules.bed import PASS_SECONDS, VirtualExecutor, virtual_engine
from .schedules.oracle import FINGERPRINT, MAX_LENGTH, MODEL, oracle
from .schedules.work import prompt
from .virtual_time import run

SPAN = Span(0, 2)
RIGHT = Speeds(decode=1 / PASS_SECONDS, prefill=MEASURED_PREFILL_TOKENS / PASS_SECONDS)


@contextlib.asynccontextmanager
async def server(announced: Speeds, *, num_pages: int = 40) -> AsyncIterator[tuple[Engine, VirtualExecutor]]:
    """An engine that announces these speeds, and is timed when it is idle."""
    executor = VirtualExecutor()
    engine = virtual_engine(SPAN, executor, num_pages=num_pages, watch=Watch(announced, SPAN))
    async with engine.running(), background(time_when_idle(engine, "own")):
        yield engine, executor
        engine.check_integrity()


def play(
    act: Callable[[Engine, VirtualExecutor], Awaitable[None]], announced: Speeds = RIGHT, *, num_pages: int = 40
) -> None:
    async def scene() -> None:
        async with server(announced, num_pages=num_pages) as (engine, executor):
            await act(engine, executor)

    run(scene())


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_speed_from_a_bad_moment_is_corrected_although_no_client_comes(factor: float):
    async def act(engine: Engine, executor: VirtualExecutor) -> None:
        await asyncio.sleep(300.0)
        assert engine.speeds == Speeds(pytest.approx(RIGHT.decode), pytest.approx(RIGHT.prefill))
        assert engine.cache_tokens_left == engine.cache_tokens
        assert not engine.num_sessions

    play(act, Speeds(RIGHT.decode * factor, RIGHT.prefill * factor))


def test_a_speed_that_is_about_right_stays():
    announced = Speeds(RIGHT.decode * 1.5, RIGHT.prefill / 1.5)

    async def act(engine: Engine, executor: VirtualExecutor) -> None:
        await asyncio.sleep(300.0)
        assert engine.speeds == announced
        assert engine.num_passes > 0

    play(act, announced)


def test_a_server_that_becomes_slow_while_it_is_idle_notices_at_the_next_check():
    async def act(engine: Engine, executor: VirtualExecutor) -> None:
        await asyncio.sleep(300.0)
        passes = engine.num_passes
        executor.slowness = 10.0
        await asyncio.sleep(EVERY_SECONDS / 2)
        assert engine.num_passes == passes  # it was timed already
        assert engine.speeds == RIGHT
        await asyncio.sleep(EVERY_SECONDS / 2 + 300.0)
        assert engine.speeds == Speeds(pytest.approx(RIGHT.decode / 10), pytest.approx(RIGHT.prefill / 10))

    play(act)


def test_a_server_that_works_for_clients_is_not_timed():
    async def act(engine: Engine, executor: VirtualExecutor) -> None:
        request = Open(
            model=MODEL.key, fingerprint=FINGERPRINT, start=0, end=2, batch_size=1, expected_length=MAX_LENGTH
        )
        session, _ = engine.open("client", request, {})
        for position in range(100):
            await asyncio.sleep(IDLE_SECONDS / 2)
            inputs = engine.validator.step_inputs({"hidden": oracle().embed(prompt(1, 1)).detach()})
            await engine.step(session, Step(position=position), inputs)
        assert engine.num_passes == 100
        engine.close(session)

    play(act)


def test_a_server_whose_cache_is_full_is_not_timed():
    async def act(engine: Engine, executor: VirtualExecutor) -> None:
        await asyncio.sleep(300.0)
        assert engine.num_passes == 0

    play(act, num_pages=8)
