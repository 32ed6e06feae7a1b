"""A gateway behind a real socket, in front of a swarm in memory, and OpenAI's and Anthropic's own clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shoal.bundled import STORIES
from shoal.gateway.app import Gateway, application
from shoal.gateway.guard.admission import Admission
from shoal.gateway.served_model import ServedModel

from ..gateways import served_at
from ..harness import Swarm, swarm_of
from .asked import PROMPT, TEMPLATE, Expected


@pytest.fixture(scope="module")
def stories() -> PreTrainedModel:
    """The bundled model in one piece: the oracle."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(STORIES)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def net() -> Iterator[Swarm]:
    with swarm_of(STORIES, "0:6", "6:12") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def url(net: Swarm, tokenizer: Any) -> Iterator[str]:
    served = ServedModel("stories", net.model(), tokenizer)
    with served_at(application(Gateway([served], Admission()))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(stories: PreTrainedModel, tokenizer: Any) -> Expected:
    """What plain Transformers continues a prompt with."""

    def expected(prompt: str = PROMPT, num_tokens: int = 16, **options: Any) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        text = stories.generate(ids, max_new_tokens=num_tokens, **({"do_sample": False} | options))
        return str(tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True))

    return expected
