"""What an engine keeps of forward passes: whatever becomes of a pass, nothing of it stays."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
import torch

from shoal.adapters import Lora
from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter, get_ready
from shoal.protocol import Backward, Forward
from shoal.server.engine.engine_limits import Limits
from shoal.server.refusals import Refused
from shoal.server.step_inputs import StepInputs
from shoal.server.training.block_passes import backward, forward_to_keep
from shoal.server.training.pass_blocks import PassBlocks
from shoal.server.training.saved_activations import ByteBudget, SavedActivations

from .tiny_models import NUM_BLOCKS
from .visitors import engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio

PASS = "a" * 32
ON_SPAN: dict[str, Any] = {"model": "", "fingerprint": "", "start": 0, "end": NUM_BLOCKS}


@pytest.fixture
def body() -> Body:
    get_ready()  # what its import logs, tests keep, and with it whatever was computed just then
    return tiny_body("llama")


def finished(pieces: Any) -> Any:
    """The outcome of work in pieces."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def kept_pass(body: Body) -> SavedActivations:
    """A pass with an adapter in every second block."""
    inputs = StepInputs(random_inputs(1, body, 1, 5), None, None)
    adapters = {block: lora_of(body, block) for block in range(1, NUM_BLOCKS, 2)}
    kept = SavedActivations(PassBlocks(body, body.span, inputs, adapters, None), ByteBudget(1 << 30))
    finished(forward_to_keep(kept.blocks, kept, frozenset()))
    return kept


def lora_of(body: Body, block: int) -> BlockAdapter:
    layer = Lora(module="self_attn.q_proj", rank=2, scaling=1.0)
    values_N = torch.ones(2 * 2 * body.backbone.config.hidden_size)
    return BlockAdapter(body.block(block), [layer], values_N, name="", hidden_size=body.backbone.config.hidden_size)


def forget(kept: SavedActivations) -> None:
    for graph in kept.graphs:
        graph.forget()


def drop(kept: SavedActivations) -> None:
    kept.drop()


def walk_back_to_the_factors(kept: SavedActivations) -> None:
    blocks = kept.blocks
    finished(
        backward(
            blocks,
            torch.ones_like(blocks.inputs_BTD),
            kept,
            frozenset(),
            inputs=False,
            learning=frozenset(blocks.adapters),
        )
    )


@pytest.mark.parametrize("end", [forget, drop, walk_back_to_the_factors], ids=lambda end: end.__name__)
def test_graphs_that_nobody_walks_to_their_end_are_let_go_of(body: Body, end: Any):
    kept = kept_pass(body)
    there = [weakref.ref(graph.entered_BTD) for graph in kept.graphs]
    end(kept)
    del kept
    gc.collect()
    assert [each() for each in there] == [None] * NUM_BLOCKS


async def test_who_is_told_to_come_back_takes_no_room_meanwhile(body: Body):
    inputs = random_inputs(1, body, 1, 5)
    async with engine_of(body, num_pages=4, limits=Limits(waiting_bytes=inputs.nbytes)) as engine:
        await engine.passes.forward("trainer", Forward(**ON_SPAN, keep=PASS), StepInputs(inputs, None, None))
        taken = engine.passes.activations.room.num_bytes
        view = asyncio.create_task(engine.passes.forward("another", Forward(**ON_SPAN), StepInputs(inputs, None, None)))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="too many passes are waiting"):
            await engine.passes.backward("trainer", Backward(**ON_SPAN, kept=PASS), inputs, None)
        assert taken > 0
        assert engine.passes.activations.room.num_bytes == 0
        await view


async def test_only_passes_of_adapters_that_left_are_let_go_of(body: Body):
    inputs, (mine, theirs) = random_inputs(1, body, 1, 5), (lora_of(body, 1), lora_of(body, 1))
    async with engine_of(body, num_pages=4) as engine:
        for peer, adapter in (("a", mine), ("b", theirs)):
            blocks = PassBlocks(body, body.span, StepInputs(inputs, None, None), {1: adapter}, None)
            kept = engine.passes.activations.new(blocks)
            finished(forward_to_keep(blocks, kept, frozenset()))
            engine.passes.activations.keep(peer, PASS, kept)
        engine.passes.activations.drop_adapters({mine})
        assert engine.passes.activations.take("a", PASS) is None
        assert engine.passes.activations.take("b", PASS) is kept
        kept.drop()
        assert engine.passes.activations.room.num_bytes == 0
