"""A cache in int8 takes half of the memory and hardly changes the text of a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shoal.bundled import STORIES
from shoal.errors import UserError
from shoal.model.remote_cache import RemoteCache
from shoal.server.kv.cache_shapes import KeyValueShape
from shoal.server.kv.paged_cache import Int8Pages

from .harness import Swarm, swarm_of
from .tiny_models import tiny_config, tiny_model
from .visitors import Visitor, engine_of, random_inputs, tiny_body

STORY = (
    "Once upon a time, there was a little girl named Lily. She lived in a small house near the forest. One day, Lily "
    "found a box under the big tree. She wanted to know what was in it."
)


@pytest.fixture(scope="module")
def stories() -> PreTrainedModel:
    """The bundled model in one piece."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with swarm_of(STORIES, "0:6", "6:12", cache_dtype="int8") as started:
        yield started


@torch.no_grad()
def test_the_next_tokens_are_as_likely_as_with_an_exact_cache(swarm: Swarm, stories: PreTrainedModel):
    tokens = AutoTokenizer.from_pretrained(STORIES)(STORY, return_tensors="pt").input_ids
    model = swarm.model()
    with model.inference_session(max_length=tokens.shape[1], batch_size=1) as session:
        cache = RemoteCache(session)
        # One by one, so that every token attends to what is in the cache.
        logits = torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)
    expected = stories(tokens).logits
    found, wanted = logits.log_softmax(-1), expected.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert divergence.median() < 1e-5  # nats; a token's own entropy is about one
    assert divergence.max() < 5e-3
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97
    loss_of = torch.nn.functional.cross_entropy
    losses = [loss_of(each[0, :-1], tokens[0, 1:]).item() for each in (logits, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.005)


def test_keys_and_values_take_half_of_the_memory_of_bfloat16():
    shape = KeyValueShape(num_heads=8, key_size=64, value_size=64)
    assert shape.nbytes(torch.int8) < 0.54 * shape.nbytes(torch.bfloat16)


@pytest.mark.anyio
@pytest.mark.parametrize("family", ["llama", "bloom", "mpt", "falcon_h1", "lfm2", "nemotron_h"])
async def test_keys_and_values_of_every_kind_of_family_are_rounded_only(family: str) -> None:
    body = tiny_body(family)
    inputs = random_inputs(1, body, 1, 40)
    async with engine_of(body, num_pages=20, kind=Int8Pages) as engine:
        visitor = Visitor(engine, body)
        for hidden in inputs.split([30, *[1] * 10], dim=1):
            await visitor.step(hidden)
        visitor.leave()
    with torch.inference_mode():
        expected = body(inputs)
    found = visitor.outputs_BSD[:, 30:]
    errors = (found - expected[:, 30:]).norm(dim=-1) / expected[:, 30:].norm(dim=-1)
    assert 0 < errors.median() < 0.02


def test_int8_is_refused_for_a_family_whose_results_it_changes_too_much(tmp_path: Path) -> None:
    tiny_model(tiny_config("qwen3_5_text")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="changes the results"), swarm_of(tmp_path, "0:5", cache_dtype="int8"):
        pass
