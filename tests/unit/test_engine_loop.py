"""Who gets the compute thread, in a time that only computing takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import torch

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.model_runner import ModelRunner
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk
from shoal.server.kv.pages import PagePool
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import Refused
from shoal.server.speed_watch import Speeds, Watch
from shoal.server.step_inputs import StepInputs
from shoal.spans import Span

from .virtual_time import virtual_loop

pytestmark = pytest.mark.anyio

T = TypeVar("T")
PASS_SECONDS, PIECE_SECONDS = 1.0, 3.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": virtual_loop}


class Clock:
    """Tells a time that passes when something is computed, and while all wait."""

    def __init__(self) -> None:
        self._computed = 0.0

    def __call__(self) -> float:
        return self._computed + asyncio.get_running_loop().time()

    def compute(self, seconds: float) -> None:
        """Let time pass at once."""
        self._computed += seconds

    @property
    def now(self) -> float:
        """The time in seconds."""
        return self()


class AtOnce(Executor):
    """Computes on the event loop, letting others have a word in between."""

    def __init__(self) -> None:
        pass

    async def run(self, function: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return function()


class Server:
    """Turns over a pass that computes nothing and takes a second, and the seconds that each side has had."""

    def __init__(
        self,
        limits: Limits,
        *,
        num_pages: int = 100,
        watch: Watch | None = None,
        executor: Executor | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.clock = Clock()
        self.inference = self.training = 0.0
        self.pool = PagePool(num_pages)
        pass_time = PassTimeModel.measured(decode_seconds=PASS_SECONDS, prefill_token_seconds=1e-3)
        self.loop = EngineLoop(
            ModelRunner(self._compute, executor or AtOnce()),
            self.pool,
            pass_time=pass_time,
            limits=limits,
            watch=watch,
            clock=self.clock,
            weight_of=lambda payer: (weights or {}).get(payer, 1.0),
        )
        self._num_opened = 0

    def _compute(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        self.clock.compute(PASS_SECONDS)
        self.inference += PASS_SECONDS
        return [chunk.hidden_BTD for chunk in chunks]

    def pieces(self, num_pieces: int) -> Generator[None, None, torch.Tensor]:
        for _ in range(num_pieces):
            self.clock.compute(PIECE_SECONDS)
            self.training += PIECE_SECONDS
            yield
        return torch.zeros(1)

    def session(self, peer: str = "peer") -> SessionCache:
        session = SessionCache(self.pool, Span(0, 1), opened=self._num_opened, peer=peer, salt="", batch_size=1)
        self._num_opened += 1
        self.loop.join(session)
        return session

    async def step(self, session: SessionCache, num_tokens: int = 1) -> None:
        inputs = StepInputs(torch.zeros(1, num_tokens, 1), None, None)
        session.begin_step(session.num_tokens, None, inputs)
        await self.loop.submit_step(session, inputs)

    async def train_for_ever(self, num_pieces: int = 7) -> None:
        while True:
            await self.loop.submit_pass(self.pieces(num_pieces))

    async def decode_for_ever(self, num_tokens: int = 1) -> None:
        session = self.session()
        while True:
            if session.num_tokens > 200:
                session.release()
            await self.step(session, num_tokens)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(100_000):
            if condition():
                return
            before = self.clock.now
            for _ in range(10):
                await asyncio.sleep(0)
            if self.clock.now == before:  # all wait
                await asyncio.sleep(1e-3)
        raise AssertionError("it never comes to that")


@asynccontextmanager
async def running(server: Server, *others: object) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in (server.loop.run(), *others)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
async def test_training_and_inference_that_both_wait_for_ever_get_their_shares(share: float):
    server = Server(Limits(training=share, max_num_batched_tokens=64), num_pages=1000)
    prompts = [server.decode_for_ever(150) for _ in range(8)]  # some of them always wait for the next pass
    work = [server.decode_for_ever(), *prompts, server.train_for_ever(), server.train_for_ever()]
    async with running(server, *work):
        await server.until(lambda: server.clock.now > 2000)
    assert server.training / server.clock.now == pytest.approx(share, abs=0.02)


async def test_training_has_all_the_time_that_nobody_else_wants():
    server = Server(Limits(training=0.2))
    async with running(server, server.train_for_ever()):
        await server.until(lambda: server.clock.now > 500)
        session = server.session()
        before = server.clock.now
        await server.step(session)
        assert server.clock.now - before <= PIECE_SECONDS + PASS_SECONDS
    assert server.inference == PASS_SECONDS


async def test_a_share_that_was_not_used_is_not_saved_up():
    server = Server(Limits(training=0.2, max_num_batched_tokens=64))
    async with running(server, *(server.decode_for_ever(150) for _ in range(3))):
        await server.until(lambda: server.clock.now > 500)
        assert server.training == 0
        training = asyncio.create_task(server.train_for_ever())
        await server.until(lambda: server.clock.now > 560)
        training.cancel()
        assert 0 < server.training <= 0.2 * 60 + 2 * PIECE_SECONDS


async def test_decoding_goes_on_while_long_prompts_come_for_ever():
    server = Server(Limits(max_num_batched_tokens=64))
    async with running(server, *(server.decode_for_ever(150) for _ in range(3))):
        session = server.session()
        await server.step(session)
        for _ in range(50):
            before = server.clock.now
            await server.step(session)
            assert server.clock.now - before <= 2 * PASS_SECONDS


async def test_a_client_that_is_gone_is_not_computed():
    server = Server(Limits())
    gone = asyncio.create_task(server.step(server.session()))
    left = asyncio.create_task(server.loop.submit_pass(server.pieces(5)))
    await asyncio.sleep(0)
    assert (len(server.loop.steps), len(server.loop.passes)) == (1, 1)
    gone.cancel()
    left.cancel()
    await asyncio.gather(gone, left, return_exceptions=True)
    assert (server.loop.steps, server.loop.passes) == ([], [])
    async with running(server):
        await server.step(server.session())
    assert (server.inference, server.training) == (PASS_SECONDS, 0)


async def test_a_pass_that_fails_tells_its_client_and_nobody_else():
    def failing() -> Generator[None, None, torch.Tensor]:
        yield
        raise ArithmeticError("in the middle")

    server = Server(Limits())
    async with running(server):
        with pytest.raises(ArithmeticError):
            await server.loop.submit_pass(failing())
        assert (await server.loop.submit_pass(server.pieces(2))).shape == (1,)


async def test_those_who_wait_for_room_get_it_in_the_order_in_which_they_came():
    server, order = Server(Limits(queue_seconds=600.0), num_pages=2), list[int]()
    first = server.session()

    async def come(number: int, num_tokens: int) -> None:
        session = server.session()
        await server.step(session, num_tokens)
        order.append(number)
        session.release()
        server.loop.wake()

    async with running(server):
        await server.step(first, 17)
        visits = [asyncio.create_task(come(number, 32 if number == 1 else 1)) for number in range(4)]
        await server.until(lambda: len(server.loop.steps) == 4)
        first.release()
        server.loop.wake()
        await asyncio.gather(*visits)
    assert order == [0, 1, 2, 3]


async def test_who_waits_for_room_in_vain_is_told():
    server = Server(Limits(queue_seconds=0.1), num_pages=1)
    async with running(server):
        await server.step(server.session(), 16)
        with pytest.raises(Refused, match=r"no room in the cache for 0\.1 s"):
            await server.step(server.session(), 1)


async def test_whose_first_tokens_are_being_computed_is_not_told_that_there_is_no_room():
    slow = asyncio.Event()

    class Slow(AtOnce):
        async def run(self, function: Callable[[], T]) -> T:
            await slow.wait()
            return function()

    server = Server(Limits(queue_seconds=0.05), executor=Slow())
    async with running(server):
        step = asyncio.create_task(server.step(server.session(), 30))
        asyncio.get_running_loop().call_later(0.1, slow.set)
        await step


async def test_passes_that_take_much_less_or_longer_than_announced_correct_what_is_announced():
    watch = Watch(Speeds(decode=0.01, prefill=1e6), Span(0, 1))
    server = Server(Limits(), watch=watch)
    async with running(server, server.decode_for_ever(), server.decode_for_ever()):
        await server.until(lambda: server.clock.now > 60)
        assert watch.speeds.decode == pytest.approx(1 / PASS_SECONDS)
    async with running(server, server.decode_for_ever(256)):
        await server.until(lambda: server.clock.now > 180)
    assert watch.speeds.prefill == pytest.approx(256 / PASS_SECONDS)


async def test_sessions_that_are_left_alone_keep_no_other_out():
    server = Server(Limits(queue_seconds=600.0), num_pages=20)
    async with running(server):
        idle = [server.session("greedy") for _ in range(20)]
        for session in idle:
            await server.step(session)
        server.clock.compute(31.0)
        honest = server.session("honest")
        await server.step(honest, 40)
        for _ in range(200):
            await server.step(honest)
        assert not honest.preempted
        assert honest.num_tokens == 240


async def test_one_peer_that_holds_everything_and_is_at_work_lets_another_one_begin_after_a_while():
    server = Server(Limits(queue_seconds=600.0), num_pages=20)

    async def work(session: SessionCache) -> None:
        while True:
            await server.step(session)

    async with running(server):
        greedy = [server.session("greedy") for _ in range(5)]
        for session in greedy:
            await server.step(session, 4 * 16 - 1)
        honest = server.session("honest")
        begun = asyncio.create_task(server.step(honest, 30))
        for _ in range(50):
            for session in greedy:
                if not session.preempted:
                    await asyncio.gather(server.step(session), return_exceptions=True)
                    if session.num_tokens == 64:
                        session.begin_step(48, None, StepInputs(torch.zeros(1, 1, 1), None, None))  # it does not grow
        await begun
        assert server.clock.now > 30
        assert sum(session.preempted for session in greedy) == 1


async def test_whose_peer_holds_less_begins_before_others_of_a_peer_that_holds_much():
    server, order = Server(Limits(queue_seconds=600.0), num_pages=4), list[str]()
    first = server.session("greedy")

    async def come(peer: str) -> None:
        session = server.session(peer)
        await server.step(session, 32)
        order.append(peer)
        session.release()
        server.loop.wake()

    async with running(server):
        await server.step(first, 48)
        visits = [asyncio.create_task(come(peer)) for peer in ("greedy", "greedy", "honest")]
        await server.until(lambda: len(server.loop.steps) == 3)
        first.begin_step(32, None, StepInputs(torch.zeros(1, 1, 1), None, None))
        server.loop.wake()
        await asyncio.gather(*visits)
    assert order == ["honest", "greedy", "greedy"]


async def pieces_of_each(server: Server, *, seconds: float) -> dict[str, int]:
    """How many passes of a giver and of a taker are computed, of whom each always has one that waits."""
    had = dict.fromkeys(("taker", "giver"), 0)

    async def ask(payer: str) -> None:
        while True:
            await server.loop.submit_pass(server.pieces(1), payer)
            had[payer] += 1

    async with running(server, *(ask(payer) for payer in had for _ in range(2))):
        await server.until(lambda: server.clock.now > seconds)
    return had


async def test_a_payer_with_a_weight_is_served_before_others_when_there_is_a_queue_and_keeps_no_one_out():
    alike = await pieces_of_each(Server(Limits()), seconds=900)
    assert alike["giver"] == pytest.approx(alike["taker"], rel=0.05)
    weighed = await pieces_of_each(Server(Limits(), weights={"giver": 4.0}), seconds=900)
    assert weighed["giver"] == pytest.approx(4 * weighed["taker"], rel=0.1)


async def test_a_weight_changes_nothing_for_a_payer_that_is_alone():
    async def decoded(**options: Any) -> tuple[float, int]:
        server = Server(Limits(), **options)
        async with running(server):
            session = server.session("giver")
            for _ in range(20):
                await server.step(session)
            return server.clock.now, server.loop.num_passes

    assert await decoded(weights={"giver": 4.0}) == await decoded()
