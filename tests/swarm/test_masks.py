"""Attention masks with zeros before a text, in it and after it."""

# B sequences, T new tokens, S all tokens

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.model.families import CERTIFIED, PACKED

from .tiny_models import VARIANTS
from .visitors import PATIENT, Visitor, engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio

# A row each: padding before the text, after it, in it, on both sides and in it, and none.
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0, 1, 1],
        [0, 1, 1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ],
    dtype=torch.uint8,
)
IN_CHUNKS, IN_ONE = 7, 1024
FAMILIES = [
    pytest.param(family, changes, IN_CHUNKS, id=f"{family} {variant}".strip())
    for family in sorted(CERTIFIED)
    for variant, changes in [("", {}), *VARIANTS.get(family, {}).items()]
]
FAMILIES += [
    pytest.param(family, {}, IN_ONE, id=f"{family} in one chunk")
    for family in ("bloom", "gemma2", "gemma3_text", "gpt_oss", "llama", "qwen3")
]


@pytest.mark.parametrize(("family", "changes", "max_num_batched_tokens"), FAMILIES)
async def test_a_session_with_padding_computes_what_a_single_pass_computes(
    family: str, changes: Mapping[str, Any], max_num_batched_tokens: int
):
    body = tiny_body(family, **changes)
    async with engine_of(
        body, num_pages=40, limits=replace(PATIENT, max_num_batched_tokens=max_num_batched_tokens)
    ) as engine:
        visitor = Visitor(engine, body)
        await visitor.step(random_inputs(1, body, *MASK.shape), mask_BT=MASK)
        for seed in (2, 3):
            await visitor.step(random_inputs(seed, body, len(MASK), 1))
        if family in PACKED:  # recurrent layers ignore padding after their first pass
            more = MASK[:, -4:]
            await visitor.step(random_inputs(4, body, *more.shape), mask_BT=more, position=visitor.num_tokens - 1)
        visitor.leave()
        visitor.check()
