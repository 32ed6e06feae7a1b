"""Streams: many generations at once give the tokens of Transformers' `generate()`, each as if it were alone."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

from shoal import MissingBlocks, UnsupportedOperation, UserError
from shoal.client.generation import generation_engine
from shoal.client.generation.generation import Token
from shoal.client.generation.generation_engine import GenerationEngine

from .harness import QUICK, Swarm

MakeSwarm = Callable[..., Swarm]

PROMPTS = [torch.tensor([[5, 17, 42, 9, 33]]), torch.tensor([[8, 61, 7]]), torch.tensor([[90, 2, 2, 31, 4, 4, 4, 11]])]

CONFIGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 20},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.8, "top_k": 0},
    {"do_sample": True, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"do_sample": True, "repetition_penalty": 1.2, "temperature": 0.9},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[17], [42, 9]]},
    {"sequence_bias": [[[13], 4.0]]},
    {"suppress_tokens": [3, 4, 5]},
    {"min_new_tokens": 8, "eos_token_id": list(range(40, 97))},
    {"eos_token_id": [3, 11, 60]},
    {"exponential_decay_length_penalty": (4, 1.1), "eos_token_id": [13]},
]


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def expected(whole: PreTrainedModel, prompt: torch.Tensor, seed: int, options: dict[str, Any]) -> list[int]:
    torch.manual_seed(seed)
    return whole.generate(prompt, max_new_tokens=16, **options)[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]


async def all_of(model: Any, prompt: torch.Tensor, **options: Any) -> list[int]:
    return [token.id async for token in model.stream(prompt, max_new_tokens=16, **options)]


async def together(*works: Any) -> list[list[int]]:
    return list(await asyncio.gather(*works))


def test_a_stream_has_the_tokens_of_generate(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    for prompt in PROMPTS:
        tokens = list(model.stream(prompt, max_new_tokens=16))
        assert ids_of(tokens) == expected(whole, prompt, 0, {})
        assert [token.finish_reason for token in tokens] == [None] * 15 + ["length"]


def test_streams_of_all_kinds_are_computed_together(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    wanted = [(prompt, seed, options) for seed, options in enumerate(CONFIGS) for prompt in PROMPTS]
    works = [all_of(model, prompt, seed=seed, **options) for prompt, seed, options in wanted]
    for (prompt, seed, options), found in zip(wanted, asyncio.run(together(*works)), strict=True):
        assert found == expected(whole, prompt, seed, options), options


def test_a_text_that_ends_says_so(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    third = expected(whole, PROMPTS[0], 0, {})[2]
    tokens = list(model.stream(PROMPTS[0], max_new_tokens=16, eos_token_id=third))
    assert tokens[-1].id == third
    assert [token.finish_reason for token in tokens][-1] == "stop"


def test_a_stream_tells_log_probabilities(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    tokens = list(model.stream(PROMPTS[0], max_new_tokens=4, num_logprobs=3, repetition_penalty=1.5))
    text = torch.cat((PROMPTS[0], torch.tensor([ids_of(tokens)])), dim=1)
    logprobs_SV = torch.log_softmax(whole(text).logits[0, PROMPTS[0].shape[1] - 1 : -1].detach(), dim=-1)
    for token, row_V in zip(tokens, logprobs_SV, strict=True):
        assert token.logprob == pytest.approx(float(row_V[token.id]), abs=1e-4)
        top = row_V.topk(3)
        assert [each for each, _ in token.top_logprobs] == top.indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_streams_continue_a_session(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    with model.inference_session(max_length=64) as session:
        first = ids_of(list(model.stream(PROMPTS[0], max_new_tokens=4)))
        second = ids_of(list(model.stream(None, max_new_tokens=3, session=session)))
        third = model.generate(None, max_new_tokens=3)[0].tolist()
        assert not session.is_closed
    assert first + second + third == expected(whole, PROMPTS[0], 0, {})[:10]


def engine_of(model: Any) -> GenerationEngine:
    """Nothing public says what runs for a stream that nobody holds any more."""
    engine: GenerationEngine = model._started_engine()
    return engine


def test_a_closed_stream_frees_its_servers(swarm: MakeSwarm):
    net = swarm("0:2", "2:4")
    model = net.model()
    free = [server.engine.cache_tokens_left for server in net.servers.values()]
    with model.stream(PROMPTS[0], max_new_tokens=400) as stream:
        next(stream)
        assert [server.engine.cache_tokens_left for server in net.servers.values()] < free
    net.settle(lambda: [server.engine.cache_tokens_left for server in net.servers.values()] == free)
    assert list(stream) == []


def test_a_forgotten_stream_ends(swarm: MakeSwarm):
    model = swarm("0:4").model()
    engine = engine_of(model)
    stream = model.stream(PROMPTS[0], max_new_tokens=400)
    next(stream)
    del stream
    gc.collect()
    model.blocks.runtime.run(asyncio.sleep(0))
    assert engine.num_running == 0


def test_a_forgotten_model_is_not_kept_by_its_streams(swarm: MakeSwarm):
    model = copy.deepcopy(swarm("0:4").model())  # the harness keeps the original, to close it
    list(model.stream(PROMPTS[0], max_new_tokens=3))
    forgotten = weakref.ref(model)
    del model
    gc.collect()
    assert forgotten() is None


class _Broken(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ValueError("a caller's mistake")


def test_what_one_stream_does_wrong_ends_that_one_only(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()

    async def both() -> list[int]:
        good = asyncio.create_task(all_of(model, PROMPTS[0]))
        with pytest.raises(ValueError, match="a caller's mistake"):
            await all_of(model, PROMPTS[1], logits_processor=[_Broken()])
        return await good

    assert asyncio.run(both()) == expected(whole, PROMPTS[0], 0, {})


class _Gate(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing, and keeps the engine's thread until it is opened."""

    def __init__(self) -> None:
        self.is_reached, self.may_pass, self.is_passed = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.is_reached.set()
        assert self.may_pass.wait(60)
        self.is_passed.set()
        return scores


def test_a_caller_whose_event_loop_is_closed_ends_its_own_stream_only(swarm: MakeSwarm, whole: PreTrainedModel):
    net = swarm("0:4")
    model, gate = net.model(), _Gate()
    engine = engine_of(model)
    gone = model.stream(PROMPTS[1], max_new_tokens=400, logits_processor=[gate])
    other = model.stream(PROMPTS[0], max_new_tokens=16)
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(anext(gone))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gate.may_pass.set()
    assert ids_of(list(other)) == expected(whole, PROMPTS[0], 0, {})
    net.settle(lambda: engine.num_running == 0)
    assert not waiting.done()


def test_a_mistake_of_the_engine_ends_its_streams_and_others_may_begin(
    swarm: MakeSwarm, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    model = swarm("0:4").model()
    with monkeypatch.context() as broken:
        broken.setattr(generation_engine, "COMPANY_SECONDS", None)
        with pytest.raises(TypeError):
            list(model.stream(PROMPTS[0], max_new_tokens=16))
    assert ids_of(list(model.stream(PROMPTS[0], max_new_tokens=16))) == expected(whole, PROMPTS[0], 0, {})


def test_a_stream_is_closed_when_nothing_touches_its_session_any_more(swarm: MakeSwarm, whole: PreTrainedModel):
    net = swarm("0:4")
    model, gate = net.model(), _Gate()
    engine = engine_of(model)

    async def open_the_gate() -> None:
        """Once the stream has ended, and whatever waited for nothing else has gone on."""
        while engine.num_running:  # noqa: ASYNC110 - nothing tells when it comes to hold
            await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        gate.may_pass.set()

    with model.inference_session(max_length=64) as session:
        stream = model.stream(PROMPTS[0], max_new_tokens=16, session=session, logits_processor=[gate])
        assert gate.is_reached.wait(60)
        model.blocks.runtime.start(open_the_gate())
        stream.close()
        assert gate.is_passed.is_set()
        text = model.generate(PROMPTS[0], max_new_tokens=16, session=session)
    assert text[0, PROMPTS[0].shape[1] :].tolist() == expected(whole, PROMPTS[0], 0, {})


def test_a_server_that_is_lost_is_invisible_in_streams(swarm: MakeSwarm, whole: PreTrainedModel):
    net = swarm("0:2", "0:2", "2:4", "2:4")
    model = net.model()

    async def watched(prompt: torch.Tensor, *, kills: bool) -> list[int]:
        found: list[int] = []
        async for token in model.stream(prompt, max_new_tokens=16):
            found.append(token.id)
            if kills and len(found) == 5:
                (*sessions,) = model.blocks.runtime.sessions
                net.network.kill(sessions[0].hops[0].server.peer)
        return found

    works = [watched(prompt, kills=index == 0) for index, prompt in enumerate(PROMPTS)]
    assert asyncio.run(together(*works)) == [expected(whole, prompt, 0, {}) for prompt in PROMPTS]


def test_errors_of_the_swarm_come_out_of_the_stream(swarm: MakeSwarm):
    net = swarm("0:2", "2:4")
    model = net.model(config=replace(QUICK, patience_seconds=0.0))
    stream = model.stream(PROMPTS[0], max_new_tokens=400)
    next(stream)
    net.kill("s1")
    with pytest.raises(MissingBlocks):
        list(stream)


def test_what_a_stream_cannot_do_is_refused(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with pytest.raises(UnsupportedOperation, match="beam search"):
        model.stream(PROMPTS[0], num_beams=3)
    with pytest.raises(UserError, match="one text"):
        model.stream(torch.cat((PROMPTS[0], PROMPTS[0])))
    with pytest.raises(UserError, match="one text"):
        model.stream(PROMPTS[0], num_return_sequences=2, do_sample=True)
    with pytest.raises(UserError, match="cache"):
        model.stream(PROMPTS[0], use_cache=False)
    with pytest.raises(UserError, match="embeddings"):
        model.stream(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(UserError, match="padding"):
        model.stream(PROMPTS[0], attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    with pytest.raises(UnsupportedOperation, match="guidance"):
        model.stream(PROMPTS[0], guidance_scale=1.5)
    with pytest.raises(UserError, match="num_logprobs"):
        model.stream(PROMPTS[0], num_logprobs=-1)
    with pytest.raises(ValueError, match="temperature"):
        model.stream(PROMPTS[0], do_sample=True, temperature=-3.0)


def test_streams_of_a_closed_model_end_with_an_error(swarm: MakeSwarm):
    model = swarm("0:4").model()
    stream = model.stream(PROMPTS[0], max_new_tokens=400)
    next(stream)
    model.close()
    with pytest.raises(UserError, match="closed"):
        list(stream)
    with pytest.raises(UserError, match="closed"):
        model.stream(PROMPTS[0])


def test_a_copy_of_a_model_has_streams_of_its_own(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    assert ids_of(list(model.stream(PROMPTS[0], max_new_tokens=16))) == expected(whole, PROMPTS[0], 0, {})
    twin = copy.deepcopy(model)
    assert ids_of(list(twin.stream(PROMPTS[1], max_new_tokens=16))) == expected(whole, PROMPTS[1], 0, {})
