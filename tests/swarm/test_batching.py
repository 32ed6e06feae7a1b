"""Eight sessions that share a server: each gets what it would get alone."""

# B sequences, T new tokens

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shoal.model.body import Body
from shoal.model.families import CERTIFIED
from shoal.policy.batching import snapshots
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.prefix import PAGE_TOKENS
from shoal.server.engine.engine import Engine
from shoal.spans import Span

from .tiny_models import NUM_BLOCKS, VARIANTS
from .visitors import MOST_TOKENS, PATIENT, Visitor, engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio

NUM_VISITS = 8
FAMILIES = [
    pytest.param(family, changes, id=f"{family} {variant}".strip())
    for family in sorted(CERTIFIED)
    for variant, changes in [("", {}), *VARIANTS.get(family, {}).items()]
]


@pytest.fixture(autouse=True)
def _many_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences here are short; so snapshots of their states are kept at the end of every page."""
    monkeypatch.setattr(snapshots, "MIN_INTERVAL", PAGE_TOKENS)


@dataclass(frozen=True)
class Turn:
    """More tokens, after going back by some, with the sequences rearranged."""

    num_tokens: int
    num_back: int = 0
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Visit:
    """What one client does, from when the others have taken so many steps."""

    after: int
    span: Span
    batch_size: int
    num_padding: int
    seed: int
    loop: tuple[Turn, ...]


def a_visit(chance: Random) -> Visit:
    """Half of them decode; the others also go back, follow other beams, begin anew, or bring more at once."""
    start = chance.choice([0, 0, 0, 1, 2])
    span = Span(start, chance.choice([NUM_BLOCKS, NUM_BLOCKS, start + 1, start + 2]))
    batch_size = chance.choice([1, 1, 2, 3])
    prompt = chance.choice([1, 3, 7, 16, 17, 30, 40])
    loop, num_tokens, num_rows = [Turn(prompt)], prompt, batch_size
    restless = chance.random() < 0.5
    for _ in range(chance.randrange(5)):
        turn = Turn(chance.choice([1, 1, 1, 1, 2, 12]))
        if restless and chance.random() < 0.5:
            back = chance.choice([0, 0, 1, min(2, num_tokens), num_tokens // 2, num_tokens])
            turn = replace(turn, num_back=back)
            if back < num_tokens and chance.random() < 0.7:
                rows = tuple(chance.randrange(num_rows) for _ in range(chance.choice([num_rows, num_rows, 1, 3])))
                turn = replace(turn, rows=rows)
                num_rows = len(rows)
        if num_tokens - turn.num_back + turn.num_tokens > MOST_TOKENS:
            break
        num_tokens += turn.num_tokens - turn.num_back
        loop.append(turn)
    padding = chance.randrange(prompt) if batch_size > 1 and chance.random() < 0.4 else 0
    return Visit(chance.choice([0, 0, 2, 5]), span, batch_size, padding, chance.choice([1, 1, 2, 3]), tuple(loop))


class Crowd:
    """Clients of one engine."""

    def __init__(self, body: Body, chance: Random) -> None:
        self._body = body
        self._visits = [a_visit(chance) for _ in range(NUM_VISITS)]
        self._num_pages = chance.choice([13, 20, 40, 100])
        self._limits = replace(PATIENT, max_num_batched_tokens=chance.choice([2, 7, 32, 1024]))
        self._pace = PassTimeModel.measured(decode_seconds=1e-3, prefill_token_seconds=chance.choice([1e-3, 1e-5]))
        self._num_steps = self._num_there = 0
        self._news = asyncio.Condition()
        self.num_replays = 0

    async def come(self) -> None:
        """All visits, and then the comparison of everything with what each would have seen alone."""
        async with engine_of(
            self._body, num_pages=self._num_pages, limits=self._limits, pass_time=self._pace
        ) as engine:
            visitors = [self.visitor(engine, number, visit) for number, visit in enumerate(self._visits)]
            async with asyncio.TaskGroup() as group:
                for visit, visitor in zip(self._visits, visitors, strict=True):
                    group.create_task(self._come(visit, visitor))
            for visitor in visitors:
                visitor.check()
        self.num_replays = sum(visitor.num_replays for visitor in visitors)

    def visitor(self, engine: Engine, number: int, visit: Visit) -> Visitor:
        return Visitor(engine, self._body, span=visit.span)

    async def _come(self, visit: Visit, visitor: Visitor) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._num_steps >= visit.after or not self._num_there)
            self._num_there += 1
        batch_size = visit.batch_size
        for index, turn in enumerate(visit.loop):
            batch_size = len(turn.rows) if turn.rows else batch_size
            hidden_BTD = random_inputs(100 * visit.seed + index, self._body, batch_size, turn.num_tokens)
            mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.uint8)
            if index == 0:
                mask_BT[0, : visit.num_padding] = 0
            await visitor.step(hidden_BTD, position=visitor.num_tokens - turn.num_back, rows=turn.rows, mask_BT=mask_BT)
            await self._tell(0)
        visitor.leave()
        await self._tell(-1)

    async def _tell(self, who: int) -> None:
        async with self._news:
            self._num_steps += 1
            self._num_there += who
            self._news.notify_all()


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
async def test_every_family_computes_eight_sessions_as_if_each_were_alone(family: str, changes: dict[str, object]):
    await Crowd(tiny_body(family, **changes), Random(family)).come()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
@settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(chance=st.randoms(use_true_random=False))
def test_sessions_that_come_and_go_as_they_like_do_not_notice_each_other(family: str, chance: Random):
    asyncio.run(Crowd(tiny_body(family), chance).come())
