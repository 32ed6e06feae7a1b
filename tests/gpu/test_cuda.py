"""Servers and clients on a CUDA device give what the whole model gives on the CPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.determinism import scene_of
from shoal.bundled import STORIES
from shoal.errors import UnsupportedOperation
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.attention_backends.backend_choice import Candidate, attention_of, candidates_of
from shoal.server.attention_backends.self_check import check
from shoal.server.device_memory import or_busy
from shoal.server.kv.cache_shapes import CacheShapes, KeyValueShape, cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.refusals import Refused
from shoal.spans import Span

from ..swarm.harness import QUICK, Swarm, swarm_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with swarm_of(STORIES, "0:5", "5:12", device="cuda") as each:
        yield each


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_servers_on_cuda_give_the_tokens_of_the_cpu(swarm: Swarm, whole: PreTrainedModel, device: str):
    model = swarm.model(device=device)
    answer = model.generate(PADDED.to(device), attention_mask=MASK.to(device), max_new_tokens=20)
    assert answer.tolist() == whole.generate(PADDED, attention_mask=MASK, max_new_tokens=20).tolist()


def test_a_server_on_cuda_is_replaced_by_one_on_the_cpu(swarm: Swarm, whole: PreTrainedModel):
    model = swarm.model()
    with model.inference_session(max_length=64) as session:
        first = model.generate(PROMPT, max_new_tokens=10, session=session)
        swarm.start("5:12", device="cpu")
        swarm.kill("s1")
        rest = model.generate(None, max_new_tokens=10, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=20).tolist()


def test_gradients_through_cuda_are_those_of_the_cpu(swarm: Swarm, whole: PreTrainedModel):
    model = swarm.model()
    gradients = []
    for each in (whole, model):
        embeds = each.get_input_embeddings()(PROMPT).detach().requires_grad_(True)
        each(inputs_embeds=embeds, labels=PROMPT).loss.backward()
        gradients.append(embeds.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 1, 20])
def test_an_output_head_on_cuda_gives_the_tokens_of_the_cpu(whole: PreTrainedModel, top_k: int | None):
    with swarm_of(STORIES, "0:12", device="cuda", serve_head=True) as swarm:
        model = swarm.model(config=replace(QUICK, remote_head=True, head_top_k=top_k))
        answer = model.generate(PADDED, attention_mask=MASK, max_new_tokens=20)
    assert answer.tolist() == whole.generate(PADDED, attention_mask=MASK, max_new_tokens=20).tolist()


def test_an_adapter_on_cuda_gives_the_logits_of_the_cpu(swarm: Swarm, whole: PreTrainedModel):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    logits = []
    for each in (AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32), swarm.model()):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(get_peft_model(each, config).eval()(PROMPT, use_cache=False).logits)
    assert not torch.allclose(logits[0], whole(PROMPT).logits, atol=1e-2)  # the adapter changes something
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_backend_is_chosen_and_those_that_fail_say_why(dtype: torch.dtype):
    body = load_body(Checkpoint.open(STORIES), Span(0, 2), dtype=dtype, device=torch.device("cuda"))
    cache = PagedCache(body, cache_shapes(body), 8)
    choice = attention_of(body, cache)
    print(dtype, choice.described)  # pytest -rP shows it
    assert all(reason for _, reason in choice.rejected)
    if dtype == torch.float32:
        assert choice.described.startswith("sdpa; ")


@pytest.mark.parametrize("candidate", candidates_of(torch.device("cuda")), ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_key_heads", "head_size"), [(4, 4, 64), (32, 8, 128), (6, 1, 256)])
def test_a_candidate_gives_the_reference_s_numbers_or_cannot_be_had(
    candidate: Candidate, dtype: torch.dtype, num_heads: int, num_key_heads: int, head_size: int
):
    """Wrong numbers fail here, although a server would only not use them. What is not installed is skipped."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=num_heads)
    backbone = SimpleNamespace(dtype=dtype, device=torch.device("cuda"), config=config)
    body: Any = SimpleNamespace(backbone=backbone)
    cache = PagedCache(body, CacheShapes({0: KeyValueShape(num_key_heads, head_size, head_size)}), 1)
    try:
        candidate.build(cache)
    except UnsupportedOperation as error:
        pytest.skip(str(error))
    try:
        check(candidate.build, body, cache, num_heads=num_heads)
    finally:
        candidate.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_passes_give_the_same_bits_on_cuda(dtype: torch.dtype):
    body = load_body(Checkpoint.open(STORIES), Span(0, 2), dtype=dtype, device=torch.device("cuda"))
    found = {each.what: each for each in scene_of(body)[0].compare()}
    for each in found.values():
        print(dtype, each)  # which paths are batch-invariant on this device: pytest -rP shows it
    assert found["the same step twice"].is_equal
    assert max(each.difference for each in found.values()) <= 64 * torch.finfo(dtype).eps


def test_a_real_lack_of_memory_is_busy_and_the_device_computes_on():
    taken = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(Refused, match="no memory"):
        or_busy(lambda: torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda"))
    del taken
    assert or_busy(lambda: int(torch.ones(1 << 20, device="cuda").sum())) == 1 << 20
