"""What an engine saves of forward passes: however a pass ends, nothing of it stays in memory."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
import torch

from shoal.adapters import Lora
from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter, import_peft
from shoal.policy.batching.engine_limits import Limits
from shoal.protocol import Backward, Forward
from shoal.server.refusals import Refused
from shoal.server.step_inputs import StepInputs
from shoal.server.training.block_passes import backward, forward_saving
from shoal.server.training.pass_blocks import PassBlocks
from shoal.server.training.saved_activations import ByteBudget, SavedActivations

from .tiny_models import NUM_BLOCKS
from .visitors import engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio

PASS = "a" * 32
ON_SPAN: dict[str, Any] = {"model": "", "fingerprint": "", "start": 0, "end": NUM_BLOCKS}


@pytest.fixture
def body() -> Body:
    import_peft()  # pytest keeps the log records of PEFT's import, and with them the frames of a pass
    return tiny_body("llama")


def finished(pieces: Any) -> Any:
    """The outcome of work in pieces."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def saved_pass(body: Body) -> SavedActivations:
    """A pass with an adapter in every second block."""
    inputs = StepInputs(random_inputs(1, body, 1, 5), None, None)
    adapters = {block: lora_of(body, block) for block in range(1, NUM_BLOCKS, 2)}
    saved = SavedActivations(PassBlocks(body, body.span, inputs, adapters, None), ByteBudget(1 << 30))
    finished(forward_saving(saved.blocks, saved, frozenset()))
    return saved


def lora_of(body: Body, block: int) -> BlockAdapter:
    layer = Lora(module="self_attn.q_proj", rank=2, scaling=1.0)
    values_N = torch.ones(2 * 2 * body.backbone.config.hidden_size)
    return BlockAdapter(body.block(block), [layer], values_N, name="", hidden_size=body.backbone.config.hidden_size)


def drop_graphs(saved: SavedActivations) -> None:
    for activations in saved.of_blocks:
        activations.drop_graph()


def drop(saved: SavedActivations) -> None:
    saved.drop()


def walk_back_to_the_factors(saved: SavedActivations) -> None:
    blocks = saved.blocks
    finished(
        backward(
            blocks,
            torch.ones_like(blocks.inputs_BTD),
            saved,
            frozenset(),
            inputs=False,
            trained=frozenset(blocks.adapters),
        )
    )


@pytest.mark.parametrize("end", [drop_graphs, drop, walk_back_to_the_factors], ids=lambda end: end.__name__)
def test_graphs_are_freed_even_if_no_backward_pass_goes_through_all_of_them(body: Body, end: Any):
    saved = saved_pass(body)
    references = [weakref.ref(activations.inputs_BTD) for activations in saved.of_blocks]
    end(saved)
    del saved
    gc.collect()
    assert [each() for each in references] == [None] * NUM_BLOCKS


async def test_a_client_that_is_refused_as_busy_takes_none_of_the_budget_meanwhile(body: Body):
    inputs = random_inputs(1, body, 1, 5)
    async with engine_of(body, num_pages=4, limits=Limits(waiting_bytes=inputs.nbytes)) as engine:
        await engine.passes.forward("trainer", Forward(**ON_SPAN, keep=PASS), StepInputs(inputs, None, None))
        taken = engine.passes.activations.budget.used_bytes
        waiting = asyncio.create_task(
            engine.passes.forward("another", Forward(**ON_SPAN), StepInputs(inputs, None, None))
        )
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="too many passes are waiting"):
            await engine.passes.backward("trainer", Backward(**ON_SPAN, kept=PASS), inputs, None)
        assert taken > 0
        assert engine.passes.activations.budget.used_bytes == 0
        await waiting


async def test_only_passes_of_removed_adapters_are_dropped(body: Body):
    inputs, (mine, theirs) = random_inputs(1, body, 1, 5), (lora_of(body, 1), lora_of(body, 1))
    async with engine_of(body, num_pages=4) as engine:
        for peer, adapter in (("a", mine), ("b", theirs)):
            blocks = PassBlocks(body, body.span, StepInputs(inputs, None, None), {1: adapter}, None)
            saved = engine.passes.activations.new(blocks)
            finished(forward_saving(blocks, saved, frozenset()))
            engine.passes.activations.save(peer, PASS, saved)
        engine.passes.activations.drop_adapters({mine})
        assert engine.passes.activations.take("a", PASS) is None
        assert engine.passes.activations.take("b", PASS) is saved
        saved.drop()
        assert engine.passes.activations.budget.used_bytes == 0
