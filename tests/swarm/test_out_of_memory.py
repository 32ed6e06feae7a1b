"""A device whose memory runs out in a pass costs clients some time. They lose no token, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from shoal.model.body import Body
from shoal.policy.batching.pass_size import PASSES_TO_GROW, PassSize
from shoal.protocol import Forward, Open, Step
from shoal.server.device_memory import or_busy, unless_out_of_memory
from shoal.server.engine.model_runner import ModelRunner
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk, HalfWritten
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.output_head import ServerHead
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.session_cache import Growth
from shoal.server.kv.states import States
from shoal.server.refusals import Refused
from shoal.server.step_inputs import StepInputs, WantedLogits

from .visitors import Visitor, engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio


class SmallDevice:
    """A block in whose middle memory runs out whenever it is computed for more than so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.lasts: int | None = None  # failures, until there is memory
        self.num_failures = self.num_passes = 0

    def __call__(self, block: nn.Module, _: Any, outputs: Any) -> None:
        self.num_passes += 1
        hidden: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if hidden[..., 0].numel() > self.num_tokens:
            self.num_failures += 1
            if self.num_failures == self.lasts:
                self.num_tokens = 1 << 20
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@contextlib.contextmanager
def memory_for(body: Body, num_tokens: int) -> Iterator[SmallDevice]:
    """While this is entered, the second block of a body has memory for so many tokens at once."""
    device = SmallDevice(num_tokens)
    hook = body.block(body.span.start + 1).register_forward_hook(device)
    try:
        yield device
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "mamba"])
async def test_a_prompt_that_is_too_long_for_the_memory_is_computed_in_smaller_passes(family: str):
    body = tiny_body(family)
    async with engine_of(body, num_pages=30) as engine:
        visitor = Visitor(engine, body)
        with memory_for(body, 24) as device:
            await visitor.step(random_inputs(1, body, 1, 60))
        assert device.num_failures == visitor.num_replays == 2  # of 60 tokens, and of half as many
        visitor.leave()
        visitor.check()


@pytest.mark.parametrize("family", ["llama", "mamba"])
async def test_who_decodes_beside_a_prompt_without_memory_is_not_interrupted(family: str):
    body = tiny_body(family)
    async with engine_of(body, num_pages=60) as engine:
        decoding = [Visitor(engine, body, peer=f"decoding {index}") for index in range(3)]
        for index, each in enumerate(decoding):
            await each.step(random_inputs(index, body, 1, 5))
        prompt = Visitor(engine, body, peer="prompt")

        async def decode(visitor: Visitor, seed: int) -> None:
            for token in random_inputs(seed, body, 1, 12).split(1, dim=1):
                await visitor.step(token)

        with memory_for(body, 3) as device:
            device.lasts = 4  # passes beside the prompt, and the prompt alone in each
            work = [decode(each, 10 + index) for index, each in enumerate(decoding)]
            await asyncio.gather(*work, prompt.step(random_inputs(20, body, 1, 50)))
        assert device.num_failures > 0
        assert prompt.num_replays > 0
        assert [each.num_replays for each in decoding] == [0, 0, 0]
        for each in (*decoding, prompt):
            each.leave()
            each.check()


async def test_a_client_whose_step_never_fits_is_told_to_come_back_and_holds_nothing():
    body = tiny_body("llama")
    async with engine_of(body, num_pages=20) as engine:
        opened = Open(
            batch_size=1, model="", fingerprint="", start=body.span.start, end=body.span.end, expected_length=10
        )
        session, _ = engine.open("peer", opened, {})
        inputs = StepInputs(random_inputs(1, body, 1, 3), None, None)
        with memory_for(body, 0), pytest.raises(Refused, match="no memory for this step"):
            await engine.step(session, Step(position=0), inputs)
        engine.close(session)
        engine.check_integrity()
        assert engine.cache_tokens_left == engine.cache_tokens


async def test_a_pass_without_a_cache_that_finds_no_memory_is_to_come_back():
    body = tiny_body("llama")
    inputs = StepInputs(random_inputs(1, body, 1, 30), None, None)
    request = Forward(model="", fingerprint="", start=body.span.start, end=body.span.end)
    async with engine_of(body, num_pages=20) as engine:
        with memory_for(body, 20), pytest.raises(Refused) as refused:
            await engine.passes.forward("peer", request, inputs)
        assert refused.value.failure.code == "busy"
        assert (await engine.passes.forward("peer", request, inputs)).shape == inputs.hidden_BTD.shape


def chunk(body: Body, page: int, *, wanted: WantedLogits | None = None) -> Chunk:
    hidden = random_inputs(page, body, 1, 3)
    growth = Growth((), (page,), new_slots=(page,))
    return Chunk(body.span, hidden, None, None, 0, ((page,),), growth, slots=(page,), wanted=wanted)


async def test_what_is_computed_is_not_computed_again_if_the_head_finds_no_memory():
    body, num_passes = tiny_body("llama"), list[int]()

    def compute(chunks: Sequence[Chunk]) -> list[Tensor | Exception]:
        num_passes.append(len(chunks))
        return [each.hidden_BTD for each in chunks]

    def head(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    executor = Executor()
    try:
        runner = ModelRunner(compute, executor, head=cast(ServerHead, head))
        outcome = await runner.run([chunk(body, page, wanted=WantedLogits(1, None)) for page in range(2)])
    finally:
        executor.close()
    assert num_passes == [2]
    assert outcome.tokens_without_memory == 6
    assert [cast(Refused, each).failure.code for each in outcome.answers] == ["busy", "busy"]


class FullStates(States):
    """States that can be read, and not written: memory runs out when a pass is all but done."""

    def write(self, *_: Any) -> None:
        raise torch.OutOfMemoryError


def test_a_pass_that_has_begun_to_write_states_is_not_computed_again():
    body = tiny_body("mamba")
    cache = PagedCache(body, cache_shapes(body), 100)
    cache.states = FullStates(cache.shapes.states, 2, torch.device("cpu"))
    with memory_for(body, 100) as device:
        outcomes = pass_over(body, cache)([chunk(body, page) for page in range(2)])
    assert device.num_passes == 2  # the prompts of the two, once each
    assert [type(each) for each in outcomes] == [HalfWritten, HalfWritten]


def test_passes_get_smaller_with_each_failure_and_larger_after_many_without():
    size = PassSize.unlimited(1024)
    assert size.after_pass() == size
    size = size.after_out_of_memory(900)
    assert size.limit == 450
    assert size.after_out_of_memory(2000).limit == 450  # a step for itself, larger than the limit
    assert size.after_out_of_memory(10).limit == 16
    for _ in range(PASSES_TO_GROW - 1):
        size = size.after_pass()
    assert size.limit == 450
    size = size.after_pass()
    assert size.limit == 900
    for _ in range(PASSES_TO_GROW):
        size = size.after_pass()
    assert size == PassSize.unlimited(1024)


def test_when_memory_runs_out_nothing_of_the_computation_is_kept():
    freed: list[str] = []

    class Tensors:
        def __del__(self) -> None:
            freed.append("tensors")

    def compute() -> int:
        held = Tensors()
        raise torch.OutOfMemoryError(f"no room for {type(held)}")

    assert unless_out_of_memory(compute) is None
    assert freed == ["tensors"]
    assert unless_out_of_memory(lambda: 3) == or_busy(lambda: 3) == 3
    with pytest.raises(Refused, match="no memory") as refused:
        or_busy(compute)
    assert refused.value.failure.code == "busy"
    with pytest.raises(ZeroDivisionError):
        unless_out_of_memory(lambda: 1 // 0)
