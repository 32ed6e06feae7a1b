"""Sessions of recurrent families begin with what others have computed, and go back to it."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from shoal.model.body import Body
from shoal.policy.batching import snapshots
from shoal.prefix import PAGE_TOKENS
from shoal.server.engine.engine import Engine

from .visitors import Visitor, engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio

INTERVAL = 2 * PAGE_TOKENS
# Recurrent layers alone, beside attention, in one block with attention, and convolutions.
FAMILIES = ["mamba2", "qwen3_5_text", "falcon_h1", "lfm2", "nemotron_h", "kimi_linear"]


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MIN_INTERVAL", INTERVAL)


def visitor_with(inputs_BSD: Tensor, engine: Engine, body: Body) -> Visitor:
    """A visitor that has these inputs and no session, as after the loss of another server."""
    visitor = Visitor(engine, body)
    visitor.inputs_BSD, visitor.mask_BS = inputs_BSD, torch.ones(inputs_BSD.shape[:2], dtype=torch.uint8)
    return visitor


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_second_session_with_the_same_beginning_computes_only_what_follows(family: str) -> None:
    body = tiny_body(family)
    prompt = random_inputs(1, body, 1, INTERVAL + PAGE_TOKENS + 3)
    async with engine_of(body, num_pages=40) as engine:
        first = Visitor(engine, body)
        await first.step(prompt)
        num_passes = engine.num_passes
        assert num_passes == 2  # up to the snapshot, and the rest
        second = visitor_with(prompt, engine, body)
        await second.step(random_inputs(2, body, 1, 1))
        assert second.num_known == INTERVAL
        assert engine.num_passes == num_passes + 1
        await first.step(random_inputs(3, body, 1, 1))  # the first one goes on with states of its own
        for visitor in (first, second):
            visitor.leave()
            visitor.check()


async def test_a_session_that_goes_back_is_rebuilt_from_the_last_snapshot() -> None:
    body = tiny_body("qwen3_5_text")
    async with engine_of(body, num_pages=40) as engine:
        visitor = Visitor(engine, body)
        await visitor.step(random_inputs(1, body, 1, INTERVAL + 5))
        await visitor.step(random_inputs(2, body, 1, 1), position=INTERVAL + 2)
        assert (visitor.num_replays, visitor.num_known) == (1, INTERVAL)
        visitor.leave()
        visitor.check()


async def test_snapshots_give_way_to_sessions() -> None:
    """A cache that is too small for the states of all sessions: what others might begin with is forgotten."""
    body = tiny_body("qwen3_5_text")
    async with engine_of(body, num_pages=12) as engine:
        for seed in range(8):
            visitor = Visitor(engine, body)
            await visitor.step(random_inputs(seed, body, 1, INTERVAL + 1))
            visitor.leave()
            engine.check_integrity()
        visitors = [Visitor(engine, body) for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            for seed, visitor in enumerate(visitors):
                group.create_task(visitor.step(random_inputs(seed, body, 1, INTERVAL + 1)))
        for visitor in visitors:
            visitor.leave()
            visitor.check()


async def test_a_family_that_goes_token_by_token_after_its_first_pass_keeps_no_snapshots() -> None:
    body = tiny_body("mamba")
    async with engine_of(body, num_pages=40) as engine:
        visitor = Visitor(engine, body)
        await visitor.step(random_inputs(1, body, 1, INTERVAL + 5))
        assert engine.num_passes == 1
        visitor.leave()
        again = visitor_with(visitor.inputs_BSD, engine, body)
        await again.step(random_inputs(2, body, 1, 1))
        assert again.num_known == 0
        again.leave()
        again.check()
