"""Prompts of thousands of tokens, in parts whose sizes follow what they take, are computed as in one piece."""

# T new tokens, S all tokens

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.server.kv import sdpa_attention
from shoal.server.kv.attention import PackedSequence
from shoal.server.kv.batch import Chunk, PackedPass
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.sdpa_attention import _mask_of
from shoal.server.kv.session_cache import Growth

from .conftest import make_llama
from .harness import Swarm, swarm_of
from .visitors import random_inputs, tiny_body

NUM_TOKENS = 3000


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads some thousands of tokens."""
    return make_llama(tmp_path_factory.mktemp("long"), seed=3, max_position_embeddings=4096)


@contextlib.contextmanager
def decoding(swarm: Swarm) -> Iterator[None]:
    """Another client decodes meanwhile."""
    model, stop, began = swarm.model(), threading.Event(), threading.Event()

    def decode() -> None:
        with model.inference_session(max_length=4096) as session:
            token = model.get_input_embeddings()(torch.tensor([[7]])).detach()
            while not stop.is_set() and session.position < 4000:
                session.step(token)
                began.set()

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        assert began.wait(60)
        yield
    finally:
        stop.set()
        thread.join()


def test_a_long_prompt_beside_a_session_that_decodes_gives_the_tokens_of_the_whole_model(long_folder: Path):
    prompt = torch.randint(2, 97, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(5))
    whole = AutoModelForCausalLM.from_pretrained(long_folder, dtype=torch.float32)
    expected = whole.generate(prompt, max_new_tokens=8).tolist()
    with swarm_of(long_folder, "0:2", "2:4", cache_tokens=16_384) as swarm, decoding(swarm):
        assert swarm.model().generate(prompt, max_new_tokens=8).tolist() == expected


@pytest.mark.parametrize("window", [None, 1, 5, 9])
@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1), (0, 6), (7, 1), (7, 6), (40, 3)])
def test_a_mask_shows_each_token_what_it_may_see_and_takes_the_memory_of_one_row(
    num_past: int, num_new: int, window: int | None
):
    num_tokens = num_past + num_new
    mask = _mask_of(PackedSequence((0,), num_past, 0, num_new), window, torch.zeros(1))
    index_S, index_T1 = torch.arange(num_tokens), torch.arange(num_past, num_tokens)[:, None]
    visible_TS = (index_S <= index_T1) & (index_S > index_T1 - (window or num_tokens))
    assert torch.equal(mask.scores.flip(0) == 0, visible_TS)
    assert mask.scores.untyped_storage().nbytes() == (num_tokens + num_new - 1) * torch.float32.itemsize
    assert mask.blind_T is None


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_attention_in_steps_is_the_same_however_many_scores_are_in_memory_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    body = tiny_body(family)
    hidden_BTD, pages = random_inputs(1, body, 1, 40), (0, 1, 2)

    def outputs() -> torch.Tensor:
        compute = PackedPass(body, PagedCache(body, cache_shapes(body), len(pages)))
        parts = []
        for start, end in ((0, 17), (17, 40)):
            chunk = Chunk(
                span=body.span,
                hidden_BTD=hidden_BTD[:, start:end],
                positions_BT=None,
                mask_BS=None,
                num_computed_tokens=start,
                pages=(pages,),
                growth=Growth((), () if start else pages),
            )
            (output,) = compute([chunk])
            assert isinstance(output, torch.Tensor)
            parts.append(output)
        return torch.cat(parts, dim=1)

    at_once = outputs()
    monkeypatch.setattr(sdpa_attention, "MAX_SCORES", 400)  # two or three of the 23 queries at a time
    torch.testing.assert_close(outputs(), at_once)
    torch.testing.assert_close(at_once, body(hidden_BTD))
