"""Soft prompts: the same as vectors before the text, and in every block, on one machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal import AutoDistributedModelForSequenceClassification
from shoal.errors import UserError

from .harness import Swarm

TOKENS = torch.arange(3, 27).view(3, 8)
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = (PADDED != 0).long()
NUM_PROMPT = 4


def embeds_of(model: Any, whole: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    prompt = model.prompt_embeddings.weight.detach().expand(len(ids), -1, -1)
    return torch.cat((prompt, whole.get_input_embeddings()(ids)), dim=1)


def mask_of(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat((mask.new_ones(len(mask), NUM_PROMPT), mask), dim=1)


class InBlocks:
    """A whole model whose blocks have something added to what enters them at the first positions."""

    def __init__(self, whole: PreTrainedModel, prompts: list[torch.Tensor]) -> None:
        self._handles = []
        for layer, prompt in zip(whole.model.layers, prompts, strict=True):
            self._handles.append(layer.register_forward_pre_hook(self._adding(prompt), with_kwargs=True))

    @staticmethod
    def _adding(prompt: torch.Tensor) -> Callable[..., Any]:
        def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            if hidden.shape[1] < len(prompt):  # later tokens
                return args, kwargs
            added = torch.cat((hidden[:, : len(prompt)] + prompt, hidden[:, len(prompt) :]), dim=1)
            return (added, *args[1:]), kwargs

        return add

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def deep_prompts(model: Any) -> list[torch.nn.Parameter]:
    return [own for name, own in model.named_parameters() if "layers" in name and name.endswith("soft_prompt")]


@pytest.fixture
def model(swarm: Callable[..., Swarm]) -> Any:
    model = swarm("0:2", "2:4").model(tuning_mode="deep_ptune", pre_seq_len=NUM_PROMPT)
    with torch.no_grad():
        for own in deep_prompts(model):
            own.normal_(std=0.5, generator=torch.Generator().manual_seed(len(own)))
    return model


def test_a_loss_and_its_gradients_are_those_of_vectors_before_the_text_and_in_every_block(
    model: Any, whole: PreTrainedModel
):
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    own = [model.prompt_embeddings.weight, *deep_prompts(model)]
    assert len(own) == 5
    assert {id(each) for each in own} == {id(each) for each in model.parameters() if each.requires_grad}
    prompt, *deep = theirs = [each.detach().clone().requires_grad_() for each in own]
    embeds = torch.cat((prompt.expand(3, -1, -1), whole.get_input_embeddings()(TOKENS)), dim=1)
    with InBlocks(whole, deep):
        labels = torch.cat((torch.full((3, NUM_PROMPT), -100), TOKENS), dim=1)
        expected = whole(inputs_embeds=embeds, labels=labels)
    # The first token has no label where nothing precedes it: the last vector of the prompt does not predict it here.
    logits = expected.logits[:, NUM_PROMPT:]
    expected_loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    gradients = torch.autograd.grad(expected_loss, theirs)
    torch.testing.assert_close(loss, expected_loss)
    for mine, gradient in zip(own, gradients, strict=True):
        assert (mine.grad - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_goes_on_from_the_prompt(model: Any, whole: PreTrainedModel, options: dict[str, Any], padded: bool):
    ids, mask = (PADDED, MASK) if padded else (TOKENS, torch.ones_like(TOKENS))
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
    with InBlocks(whole, [each.detach() for each in deep_prompts(model)]):
        expected = whole.generate(
            inputs_embeds=embeds_of(model, whole, ids), attention_mask=mask_of(mask), max_new_tokens=12, **options
        )
    assert found[:, ids.shape[1] :].tolist() == expected.tolist()


def test_a_session_over_several_calls_has_one_prompt(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=40) as session:
        first = model.generate(TOKENS[:1], max_new_tokens=5, session=session, do_sample=False)
        assert session.num_tokens == first.shape[1] - 1
        found = model.generate(None, max_new_tokens=5, session=session, do_sample=False)
    expected = model.generate(TOKENS[:1], max_new_tokens=10, do_sample=False)
    assert torch.cat((first, found), dim=1).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_a_copy_generates_from_its_prompt_and_slices_have_none(mode: str, swarm: Callable[..., Swarm]):
    model = swarm("0:4").model(tuning_mode=mode, pre_seq_len=NUM_PROMPT)
    other = copy.deepcopy(model)
    expected = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert other.generate(TOKENS, max_new_tokens=6, do_sample=False).tolist() == expected.tolist()
    with other.blocks[1:3].inference_session(max_length=8) as session:
        session.step(torch.ones(1, 8, 32))
        assert session.num_tokens == 8


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_what_was_trained_is_saved_and_loaded_as_docs_finetuning_says(
    mode: str, swarm: Callable[..., Swarm], tmp_path: Path
):
    net = swarm("0:2", "2:4")

    def new() -> Any:
        return net.model(
            AutoDistributedModelForSequenceClassification, tuning_mode=mode, pre_seq_len=NUM_PROMPT, num_labels=2
        )

    model, other = new(), new()
    for each in model.parameters():
        if each.requires_grad:
            torch.nn.init.normal_(each)
    model.save_pretrained(tmp_path)
    other.load_trained(tmp_path)
    with torch.no_grad():
        found, expected = (each(input_ids=PADDED, attention_mask=MASK).logits for each in (other, model))
    torch.testing.assert_close(found, expected)


def test_a_prompt_and_a_new_head_classify(swarm: Callable[..., Swarm]):
    net = swarm("0:2", "2:4")
    model = net.model(
        AutoDistributedModelForSequenceClassification, tuning_mode="ptune", pre_seq_len=NUM_PROMPT, num_labels=2
    )
    trained = [each for each in model.parameters() if each.requires_grad]
    assert {id(each) for each in trained} == {id(model.prompt_embeddings.weight), id(model.score.weight)}
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=PADDED, attention_mask=MASK, labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("options", [{"tuning_mode": "ptune"}, {"pre_seq_len": 4}, {"tuning_mode": "lora"}])
def test_half_a_wish_is_refused(swarm: Callable[..., Swarm], options: dict[str, Any]):
    with pytest.raises(UserError, match=r"tuning mode|mode and a length"):
        swarm("0:4").model(**options)
