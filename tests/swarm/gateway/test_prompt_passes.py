"""Passes over prompts, for embeddings and for the log-probabilities of an echo: what they cost, and when they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.bundled import STORIES
from shoal.events import Event, WaitEnded, WaitingForBlocks
from shoal.gateway.bodies import CompletionRequest, EmbeddingRequest
from shoal.gateway.endpoints import prompt_passes
from shoal.gateway.endpoints.completions import CompletionAnswer
from shoal.gateway.endpoints.embeddings import embeddings
from shoal.gateway.served_model import ServedModel

from ..harness import QUICK, Swarm, swarm_of
from .asked import PROMPT

LONG = "A hen and a goat met at the old well, and the goat told her of the hill. " * 8


class Alone:
    """Asks when no other does."""

    salt = ""

    @contextlib.asynccontextmanager
    async def text(self) -> AsyncIterator[None]:
        yield


async def embed(served: ServedModel, text: str) -> Any:
    found, _ = await embeddings(served, EmbeddingRequest(model=served.name, input=text), asker=Alone())
    return found


async def echo(served: ServedModel, text: str) -> Any:
    request = CompletionRequest(model=served.name, prompt=text, echo=True, logprobs=2, max_tokens=0)
    answer = await asyncio.to_thread(lambda: CompletionAnswer(served, request, asker=Alone()))
    return await answer.whole()


@pytest.mark.parametrize("ask", [embed, echo])
def test_a_prompt_that_waits_for_servers_keeps_no_thread_and_ends_with_its_caller(
    tokenizer: Any, ask: Callable[[ServedModel, str], Coroutine[Any, Any, Any]]
):
    async def scene(net: Swarm) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        waits, has_ended = asyncio.Event(), asyncio.Event()

        def note(event: Event) -> None:
            if isinstance(event, WaitingForBlocks):
                loop.call_soon_threadsafe(waits.set)
            if isinstance(event, WaitEnded):
                loop.call_soon_threadsafe(has_ended.set)

        model = net.model(config=replace(QUICK, patience_seconds=3600.0, observers=(note,)))
        served = ServedModel("stories", model, tokenizer)
        await ask(served, PROMPT)
        net.kill("s1")
        asking = asyncio.create_task(ask(served, PROMPT))
        await waits.wait()
        assert await asyncio.to_thread(lambda: "another request") == "another request"
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await has_ended.wait()

    with swarm_of(STORIES, "0:6", "6:12") as net:
        asyncio.run(scene(net))


def test_the_logits_of_a_long_prompt_are_never_held_together(net: Swarm, tokenizer: Any, stories: PreTrainedModel):
    served = ServedModel("stories", net.model(), tokenizer)
    ids_1S = served.ids_of_text(LONG)
    num_rows: list[int] = []
    head = served.model.get_output_embeddings()
    head.register_forward_hook(lambda head, inputs, logits: num_rows.append(logits[..., 0].numel()))
    found = asyncio.run(prompt_passes.prompt_tokens(served, ids_1S, 3))
    assert max(num_rows) <= prompt_passes.ROWS_AT_ONCE < ids_1S.shape[1]
    assert [token.id for token in found] == ids_1S[0].tolist()
    logprobs_SV = torch.log_softmax(stories(ids_1S).logits[0, :-1].detach(), dim=-1)
    for token, row_V in zip(found[1:], logprobs_SV, strict=True):
        assert token.logprob == pytest.approx(float(row_V[token.id]), abs=1e-4)
        assert [value for _, value in token.top_logprobs] == pytest.approx(row_V.topk(3).values.tolist(), abs=1e-4)


def test_the_mean_of_a_long_text_is_that_of_all_its_pieces(net: Swarm, tokenizer: Any, stories: PreTrainedModel):
    served = ServedModel("stories", net.model(), tokenizer)
    ids_1S = served.ids_of_text(LONG)
    assert ids_1S.shape[1] > prompt_passes.ROWS_AT_ONCE
    mean_D = asyncio.run(prompt_passes.mean_hidden_state(served, ids_1S))
    torch.testing.assert_close(mean_D, stories.base_model(ids_1S)[0][0].mean(dim=0).detach(), atol=1e-5, rtol=1e-4)
