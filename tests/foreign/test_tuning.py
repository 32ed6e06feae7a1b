"""What PETALS' tests ask of prompts and of heads that are trained: outputs and gradients of the model in one piece."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from shoal import AutoDistributedModelForSequenceClassification
from shoal.model.families import find_backbone
from tests.swarm.parity import assert_equal

from .pair import LEFT, MASKS, NEVER, TEXTS, Pair

NUM_PROMPT = 3


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    _, backbone, name = find_backbone(model, model.config)
    layers: nn.ModuleList = getattr(backbone, name)
    return layers


@contextlib.contextmanager
def adding(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Iterator[None]:
    """A model in one piece whose blocks have something added to the first tokens that enter them."""
    with contextlib.ExitStack() as hooks:
        for layer, prompt_PD in zip(layers_of(model), prompts, strict=True):

            def add(_: Any, args: tuple[Any, ...], prompt_PD: Tensor = prompt_PD) -> tuple[Any, ...]:
                hidden = args[0]
                if hidden.shape[1] < len(prompt_PD):
                    return args
                added = hidden[:, : len(prompt_PD)] + prompt_PD
                return (torch.cat((added, hidden[:, len(prompt_PD) :]), dim=1), *args[1:])

            handle = layer.register_forward_pre_hook(add)
            hooks.callback(handle.remove)
        yield


def embeds_with(prompt_PD: Tensor, whole: PreTrainedModel) -> Tensor:
    return torch.cat((prompt_PD.expand(len(TEXTS), -1, -1), whole.get_input_embeddings()(TEXTS)), dim=1)


def prompts_of(model: Any) -> list[Tensor]:
    """The prompt before the text, and one for each block, if there are any; all of them are trained."""
    first = model.prompt_embeddings.weight
    return [first, *(each for each in model.parameters() if each.requires_grad and each is not first)]


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompts_give_the_outputs_and_gradients_of_vectors_on_one_machine(pair: Pair, mode: str):
    model = pair.swarm.model(tuning_mode=mode, pre_seq_len=NUM_PROMPT)
    own = prompts_of(model)
    assert len(own) == (1 if mode == "ptune" else 6)
    with torch.no_grad():
        for number, each in enumerate(own):
            each.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    theirs = [each.detach().clone().requires_grad_() for each in own]
    logits = model(TEXTS, attention_mask=LEFT, use_cache=False).logits
    mask = torch.cat((LEFT.new_ones(3, NUM_PROMPT), LEFT), dim=1)
    with adding(pair.whole, theirs[1:] or [torch.zeros_like(theirs[0])] * 5):
        expected = pair.whole(inputs_embeds=embeds_with(theirs[0], pair.whole), attention_mask=mask).logits
        tokens = pair.whole.generate(
            inputs_embeds=embeds_with(theirs[0], pair.whole).detach(),
            attention_mask=mask,
            max_new_tokens=6,
            eos_token_id=NEVER,
        )
    expected = expected[:, NUM_PROMPT:]
    seen = LEFT.bool()
    assert_equal(logits[seen], expected[seen])
    for output in (logits, expected):
        output[seen].square().sum().backward()
    for mine, plain in zip(own, theirs, strict=True):
        assert mine.grad is not None
        assert plain.grad is not None
        assert_equal(mine.grad, plain.grad)
    found = model.generate(TEXTS, attention_mask=LEFT, max_new_tokens=6, eos_token_id=NEVER)
    assert found[:, TEXTS.shape[1] :].tolist() == tokens.tolist()


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "holes"])
def test_a_classifier_and_its_head_are_those_of_transformers(pair: Pair, mask: str):
    model = pair.swarm.model(AutoDistributedModelForSequenceClassification, num_labels=4)
    whole = AutoModelForSequenceClassification.from_pretrained(pair.swarm.folder, num_labels=4, dtype=torch.float32)
    with torch.no_grad():
        whole.score.weight.copy_(model.score.weight)
    found = []
    for each in (model, whole.eval()):
        output = each(**pair.inputs(mask), labels=torch.tensor([0, 3, 1]))
        output.loss.backward()
        found.append((output.logits.detach(), output.loss.detach(), each.score.weight.grad))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)
