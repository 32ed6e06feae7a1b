"""An honest client keeps its share of the compute, whatever one other asks for, in a time that only computing takes.

It is the real loop of the engine; only the model is missing. A pass takes what the simulator's server takes for it:
50 ms, 1.5 ms for each token, and more for what they see.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

import pytest
import torch

from shoal.policy.batching.engine_limits import Limits
from shoal.server.engine.adapter_turns import AdapterTurns
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.model_runner import ModelRunner
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk
from shoal.server.kv.pages import PagePool
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import RETRY_SECONDS, Refused
from shoal.server.step_inputs import StepInputs
from shoal.simulator.serving.server_setup import Part, ServerSetup
from shoal.spans import Span

from .virtual_time import run

T = TypeVar("T")
SETUP = ServerSetup(num_pages=1 << 16)
NUM_ATTACKS = 60
NUM_STEPS = 31
"""Of a session that decodes: texts are short, so that new sessions have to begin all the time."""
SECONDS = 20.0
WARM_UP_SECONDS = 5.0
"""Until then, the server learns what passes take."""
GOAL = 0.8
HONEST, ATTACKER = "honest", "192.0.2.0/24"


class Sleeping(Executor):
    """Computes at once, and takes the time that the work takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.disturbed_seconds = 0.0

    async def run(self, function: Callable[[], T]) -> T:
        outcome = function()
        left = self.seconds
        while left > 0:
            before = self.disturbed_seconds
            await asyncio.sleep(left)
            left = self.disturbed_seconds - before
        return outcome

    async def disturb(self, seconds: float) -> None:
        """Other threads work for so long, and what is computed meanwhile takes as much longer."""
        await asyncio.sleep(seconds)
        self.disturbed_seconds += seconds


class Server:
    """The loop of an engine, and clients of it."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._executor = Sleeping()
        self._pool = PagePool(SETUP.num_pages)
        self.loop = EngineLoop(
            ModelRunner(self._compute, self._executor), self._pool, pass_time=SETUP.pass_time, limits=limits or Limits()
        )
        self._adapter_turns = AdapterTurns(self.loop)
        self._num_opened = 0

    def _compute(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        rows = [(chunk, row) for chunk in chunks for row in range(chunk.hidden_BTD.shape[0])]
        parts = [Part(chunk.hidden_BTD.shape[1], chunk.num_computed_tokens) for chunk, _ in rows]
        self._executor.seconds = SETUP.seconds_of(parts)
        return [chunk.hidden_BTD for chunk in chunks]

    def pieces(self, num_pieces: int, seconds: float) -> Generator[None, None, torch.Tensor]:
        for _ in range(num_pieces):
            self._executor.seconds = seconds
            yield
        self._executor.seconds = 0.0
        return torch.zeros(1)

    def session(self, payer: str, *, rows: int = 1) -> SessionCache:
        number = self._num_opened
        self._num_opened += 1
        session = SessionCache(
            self._pool, Span(0, 1), opened=number, peer=f"peer {number}", salt="", batch_size=rows, payer=payer
        )
        self.loop.join(session)
        return session

    async def step(self, session: SessionCache, num_tokens: int = 1) -> None:
        inputs = StepInputs(torch.zeros(session.batch_size, num_tokens, 1), None, None)
        session.begin_step(session.num_tokens, None, inputs)
        await self.loop.submit_step(session, inputs)

    def close(self, session: SessionCache) -> None:
        session.release()
        self.loop.sessions.discard(session)
        self.loop.wake()

    # What clients do, for ever.

    async def decode(self, payer: str, done: list[float], *, away: float, rows: int = 1, ahead: int = 1) -> None:
        while True:
            session = self.session(payer, rows=rows)
            try:
                await self.step(session, 16)
                for _ in range(NUM_STEPS):
                    done.append(asyncio.get_running_loop().time())
                    await asyncio.sleep(away)
                    await self.step(session, ahead)
            except Refused:
                await asyncio.sleep(RETRY_SECONDS)
            self.close(session)

    async def prefill(self, payer: str, done: list[float], *, num_tokens: int = 2000, rows: int = 1) -> None:
        while True:
            session = self.session(payer, rows=rows)
            with contextlib.suppress(Refused):
                await self.step(session, num_tokens)
                done.append(asyncio.get_running_loop().time())
            self.close(session)

    async def train(self, payer: str, done: list[float], *, seconds: float, num_pieces: int = 6) -> None:
        async def microbatches() -> None:
            while True:
                with contextlib.suppress(Refused):
                    await self.loop.submit_pass(self.pieces(num_pieces, seconds), payer)
                    done.append(asyncio.get_running_loop().time())
                    continue
                await asyncio.sleep(RETRY_SECONDS)

        await asyncio.gather(microbatches(), microbatches())

    async def send_adapters(self, payer: str, done: list[float], *, seconds: float) -> None:
        while True:
            async with self._adapter_turns.turn(payer):
                await self._executor.disturb(seconds)
            done.append(asyncio.get_running_loop().time())


Work = Callable[[Server, str, list[float]], Coroutine[Any, Any, None]]


def speed(work: Work, attacks: Sequence[Work] = ()) -> float:
    """How often the honest client's work is done in a second, beside attacks."""

    async def measured() -> float:
        server, done, ignored = Server(), list[float](), list[float]()
        tasks = [asyncio.create_task(server.loop.run()), asyncio.create_task(work(server, HONEST, done))]
        tasks += [asyncio.create_task(attack(server, ATTACKER, ignored)) for attack in attacks]
        await asyncio.sleep(SECONDS)
        failed = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not failed, failed
        return sum(at > WARM_UP_SECONDS for at in done) / (SECONDS - WARM_UP_SECONDS)

    return run(measured())


def decoding(away: float = 0.005, rows: int = 1, ahead: int = 1) -> Work:
    return lambda server, payer, done: server.decode(payer, done, away=away, rows=rows, ahead=ahead)


def prompts(num_tokens: int = 2000, rows: int = 1) -> Work:
    return lambda server, payer, done: server.prefill(payer, done, num_tokens=num_tokens, rows=rows)


def training(seconds: float) -> Work:
    return lambda server, payer, done: server.train(payer, done, seconds=seconds)


def adapters(seconds: float) -> Work:
    return lambda server, payer, done: server.send_adapters(payer, done, seconds=seconds)


ATTACKS: dict[str, list[Work]] = {
    "sessions": [decoding()] * NUM_ATTACKS,
    "sessions that check guesses": [decoding(ahead=8)] * NUM_ATTACKS,
    "sessions of many rows": [decoding(rows=64)] * NUM_ATTACKS,
    "sessions of a thousand rows": [decoding(rows=1024)] * 4,
    "prompts": [prompts()] * NUM_ATTACKS,
    "prompts of many rows": [prompts(30, rows=32)] * NUM_ATTACKS,
    "passes": [training(0.3)] * NUM_ATTACKS,
    "long passes": [training(2.0)] * NUM_ATTACKS,
    "adapters": [adapters(0.02)] * NUM_ATTACKS,
    "everything": [decoding(), decoding(rows=64), prompts(), training(0.3), adapters(0.02)] * (NUM_ATTACKS // 5),
}


@pytest.mark.parametrize("name", [name for name in ATTACKS if "passes" not in name])
def test_who_decodes_keeps_its_share_of_the_compute(name: str):
    fair = speed(decoding()) / 2
    assert speed(decoding(), ATTACKS[name]) >= GOAL * fair


def test_whose_steps_are_away_for_a_while_keeps_its_share_beside_long_passes():
    fair = speed(decoding(away=0.1)) / 2
    assert speed(decoding(away=0.1), ATTACKS["long passes"]) >= GOAL * fair


@pytest.mark.parametrize("name", ["prompts", "adapters"])
def test_who_sends_prompts_keeps_its_share_of_the_compute(name: str):
    fair = speed(prompts(500)) / 2
    assert speed(prompts(500), ATTACKS[name]) >= GOAL * fair


@pytest.mark.parametrize("name", ["passes", "long passes"])
def test_who_trains_keeps_its_share_of_what_others_train(name: str):
    fair = speed(training(0.1)) / 2
    assert speed(training(0.1), ATTACKS[name]) >= GOAL * fair


def test_a_payer_with_many_passes_is_told_why_it_has_to_come_back():
    async def refused() -> str:
        server = Server(Limits(queued_passes=2))
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(server.loop.submit_pass(server.pieces(1, 0.1), ATTACKER)) for _ in range(2)]
            other = group.create_task(server.loop.submit_pass(server.pieces(1, 0.1), HONEST))
            await asyncio.sleep(0)
            with pytest.raises(Refused) as refusal:
                await server.loop.submit_pass(server.pieces(1, 0.1), ATTACKER)
            for task in (*waiting, other):
                task.cancel()
        assert refusal.value.failure.code == "busy"
        return refusal.value.failure.reason

    assert run(refused()) == f"2 passes of {ATTACKER} wait here already; all clients of one network count as one"
