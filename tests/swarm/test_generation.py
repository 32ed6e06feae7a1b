from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from .harness import Swarm

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

HOW = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beam search": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("batch", ["one", "left-padded"])
def test_generate_gives_the_tokens_of_the_whole_model(swarm: MakeSwarm, whole: PreTrainedModel, how: str, batch: str):
    if how == "prompt lookup" and batch != "one":
        batch_inputs = {"input_ids": PROMPT.repeat(1, 2)}  # assisted decoding takes one sequence only
    elif batch == "one":
        batch_inputs = {"input_ids": PROMPT}
    else:
        batch_inputs = {"input_ids": PADDED, "attention_mask": MASK}
    model = swarm("0:2", "2:3", "3:4").model()
    torch.manual_seed(1)
    expected = whole.generate(**batch_inputs, max_new_tokens=12, **HOW[how])
    torch.manual_seed(1)
    assert model.generate(**batch_inputs, max_new_tokens=12, **HOW[how]).tolist() == expected.tolist()


def test_an_assistant_model_does_not_change_the_tokens(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    expected = whole.generate(PROMPT, max_new_tokens=12)
    assert model.generate(PROMPT, assistant_model=whole, max_new_tokens=12).tolist() == expected.tolist()


def test_the_loss_and_its_gradients_are_those_of_the_whole_model(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:1", "1:4").model()
    ids = torch.randint(2, 97, (3, 500), generator=torch.Generator().manual_seed(0))  # more than one microbatch
    results = []
    for each in (whole, model):
        embeds = each.get_input_embeddings()(ids).detach().requires_grad_(True)
        output = each(inputs_embeds=embeds, labels=ids)
        output.loss.backward()
        results.append((output.logits, output.loss, embeds.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
