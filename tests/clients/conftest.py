"""A swarm of two servers with SmolLM2-135M-Instruct and a gateway before it, and the whole model: the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shoal.host.processes import Child, Children
from shoal.testing.preloaded import PreloadedProcess
from tests.known_speed import know_speed

from .installed import CLIENTS, SECONDS, SMOLLM2

KEY = "secret"
Expected = Callable[..., str]


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of the gateway, for requests with the key. Its servers find in a cache how fast they are."""
    assert (CLIENTS / ".ready").exists(), "the clients are not installed: run scripts/clients"

    def ready(*wanted: Child) -> None:
        for _ in children.wait_for(wanted, seconds=SECONDS):
            pass

    options = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "8192")
    with pytest.MonkeyPatch.context() as patch, Children() as children:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        know_speed(SMOLLM2, num_blocks=15, decode_speed=60.0)
        start = functools.partial(children.start, launch=PreloadedProcess)
        first = start("first", "serve", str(SMOLLM2), *options, "--new-swarm", "--blocks", "0:15")
        ready(first)
        peers = ("--initial-peers", first.facts["address"])
        second = start("second", "serve", str(SMOLLM2), *options, *peers, "--blocks", "15:30")
        gateway = start("gateway", "gateway", str(SMOLLM2), *peers, "--port", "0", "--api-key", KEY)
        ready(second, gateway)
        yield gateway.facts["address"]


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="package")
def whole() -> PreTrainedModel:
    """The model in one piece."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="package")
def expected(whole: PreTrainedModel, tokenizer: Any) -> Expected:
    """What plain Transformers answers a conversation or continues a prompt with, greedily."""

    def expected(prompt: str | list[dict[str, str]], num_tokens: int, *, is_endless: bool = False) -> str:
        inputs = (
            tokenizer(prompt, return_tensors="pt")
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
        ends = [] if is_endless else tokenizer.eos_token_id
        found = whole.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=ends)
        return str(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return expected
