"""Models that compute differently from some length on: sessions beside each other do not change that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from shoal.model.families import LengthRegime
from shoal.protocol import Open, Step

from .parity import assert_equal
from .visitors import engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS: list[tuple[str, dict[str, Any], LengthRegime]] = [
    ("llama", {"rope_parameters": LONGROPE}, LengthRegime("switch", 20)),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}, LengthRegime("each", 20)),
    ("llama4_text", {"floor_scale": 20, "attn_scale": 2.0, "attn_temperature_tuning": True}, LengthRegime("steps", 20)),
]


async def test_padding_of_one_session_does_not_make_another_one_longer() -> None:
    """Llama 4 scales queries by the columns of the cache, and padding has columns: 33 with padding, 17 without."""
    family, changes, _ = MODELS[-1]
    body = tiny_body.__wrapped__(family, **changes)
    mask = torch.tensor([[0] * 16 + [1] * 16])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    padded, plain = random_inputs(1, body, 1, 32), random_inputs(2, body, 1, 16)
    more = [random_inputs(seed, body, 1, 1) for seed in (3, 4)]
    async with engine_of(body, num_pages=60) as engine:
        opening = Open(model="", fingerprint="", start=0, end=body.span.end, batch_size=1, expected_length=64)
        sessions = [engine.open(f"peer {number}", opening, {})[0] for number in range(2)]

        async def step(number: int, hidden: torch.Tensor, **padding: torch.Tensor) -> torch.Tensor:
            session = sessions[number]
            inputs = engine.validator.step_inputs({"hidden": hidden, **padding})
            return (await engine.step(session, Step(position=session.num_tokens), inputs))["hidden"]

        await step(0, padded, mask=mask.to(torch.uint8), positions=positions)
        await step(1, plain)
        new = {"mask": torch.ones(1, 1, dtype=torch.uint8), "positions": torch.tensor([[16]])}
        found = await asyncio.gather(step(0, more[0], **new), step(1, more[1]))
        for session in sessions:
            engine.close(session)
    cache = body.new_cache()
    body(padded, cache=cache, attention_mask=mask, position_ids=positions)
    of_padded = body(
        more[0], cache=cache, attention_mask=torch.cat((mask, mask[:, -1:]), dim=1), position_ids=new["positions"]
    )
    cache = body.new_cache()
    body(plain, cache=cache)
    assert_equal(found[0], of_padded)
    assert_equal(found[1], body(more[1], cache=cache))


@pytest.mark.parametrize(("family", "changes", "regime"), MODELS)
async def test_sessions_on_both_sides_of_a_length_are_computed_as_if_each_were_alone(
    family: str, changes: dict[str, Any], regime: LengthRegime
) -> None:
    """The steps are those of plain Transformers with a cache. A single pass over all tokens would give others."""
    body = tiny_body.__wrapped__(family, **changes)
    assert body.family.regimes == (regime,)
    prompts = [random_inputs(seed, body, 1, num_tokens) for seed, num_tokens in enumerate((5, 17, 18, 30, 41))]
    steps = [[random_inputs(100 * seed + number, body, 1, 1) for number in range(6)] for seed in range(len(prompts))]
    async with engine_of(body, num_pages=60) as engine:
        opening = Open(model="", fingerprint="", start=0, end=body.span.end, batch_size=1, expected_length=64)
        sessions = [engine.open(f"peer {number}", opening, {})[0] for number in range(len(prompts))]
        found: list[list[torch.Tensor]] = [[] for _ in sessions]
        for turn in range(7):
            requests = []
            for session, prompt, more in zip(sessions, prompts, steps, strict=True):
                hidden = more[turn - 1] if turn else prompt
                inputs = engine.validator.step_inputs({"hidden": hidden})
                requests.append(engine.step(session, Step(position=session.num_tokens), inputs))
            for outputs, answer in zip(found, await asyncio.gather(*requests), strict=True):
                outputs.append(answer["hidden"])
        for session in sessions:
            engine.close(session)
    for prompt, more, outputs in zip(prompts, steps, found, strict=True):
        cache = body.new_cache()
        expected = [body(hidden, cache=cache) for hidden in (prompt, *more)]
        assert_equal(torch.cat(outputs, dim=1), torch.cat(expected, dim=1))
