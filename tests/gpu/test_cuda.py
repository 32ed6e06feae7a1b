"""Servers and clients on a CUDA device give what the whole model gives on the CPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal.bundled import STORIES

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
