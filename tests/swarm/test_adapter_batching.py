"""Sessions of several clients with adapters of their own, in one pass: each gets what it would get alone."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shoal.model.body import Body
from shoal.server.engine.engine import Engine

from .random_adapters import some_tuning
from .test_batching import Crowd, Visit
from .visitors import Visitor, tiny_body

PACKED = ["llama", "gemma2", "gpt2", "phi3", "deepseek_v3", "gpt_oss", "mixtral"]
ONE_BY_ONE = ["bloom", "falcon", "mamba", "mamba2", "qwen3_next"]


class Tenants(Crowd):
    """Clients of one engine, most of them with adapters, some of them with the same ones."""

    def __init__(self, body: Body, chance: Random) -> None:
        super().__init__(body, chance)
        own = [some_tuning(body, body.span, chance) for _ in range(4)]
        self._tunings = [chance.choice(own) for _ in self._visits]

    def visitor(self, engine: Engine, number: int, visit: Visit) -> Visitor:
        return Visitor(engine, self._body, span=visit.span, peer=f"client{number}", tuning=self._tunings[number])


@pytest.mark.parametrize("family", PACKED + ONE_BY_ONE)
@settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(chance=st.randoms(use_true_random=False))
def test_clients_with_adapters_do_not_notice_each_other(family: str, chance: Random):
    asyncio.run(Tenants(tiny_body(family), chance).come())
