"""Skeletons of blocks have what PEFT looks for, and no weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shoal.errors import UnsupportedOperation
from shoal.model.peft.skeleton import LINEAR, num_features, skeletons

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODELS: dict[str, PreTrainedModel] = {
    "llama": LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, attention_bias=True)),
    "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    found: nn.ModuleList = model.model.layers if hasattr(model, "model") else model.transformer.h
    return found


@pytest.fixture(params=MODELS)
def original(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]


@pytest.fixture
def skeleton(original: PreTrainedModel) -> nn.ModuleList:
    return nn.ModuleList(skeletons(list(layers_of(original)), torch.empty(0, dtype=torch.bfloat16)))


def test_a_skeleton_has_modules_of_the_same_names_and_sizes(original: PreTrainedModel, skeleton: nn.ModuleList):
    own = dict(skeleton.named_modules())
    assert own.keys() == dict(layers_of(original).named_modules()).keys()
    for name, module in layers_of(original).named_modules():
        if isinstance(module, LINEAR):
            assert isinstance(own[name], LINEAR)
            assert num_features(own[name]) == num_features(module)
            assert (own[name].bias is None) == (module.bias is None)
        for kind, parameter in module.named_parameters(recurse=False):
            weight = getattr(own[name], kind)
            assert weight.shape == parameter.shape
            assert weight.dtype == torch.bfloat16
            assert weight.untyped_storage().nbytes() == 2


def test_a_skeleton_has_no_parameters_and_takes_no_memory(skeleton: nn.ModuleList):
    for each in (skeleton, copy.deepcopy(skeleton), skeleton.to(torch.float64)):
        assert not list(each.parameters())
        assert not list(each.buffers())
        assert not each.state_dict()
        assert repr(each)


def test_the_original_model_is_not_changed(original: PreTrainedModel, skeleton: nn.ModuleList):
    assert all(parameter.numel() > 0 for parameter in layers_of(original).parameters())
    assert original(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert len(skeleton) == 2


def test_peft_finds_the_same_linear_layers_as_in_the_original(original: PreTrainedModel, skeleton: nn.ModuleList):
    def added(blocks: nn.Module) -> set[str]:
        model: Any = nn.Sequential(blocks, nn.Embedding(2, 2))
        with_peft = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        return {name for name, each in with_peft.named_parameters() if each.requires_grad}

    assert added(skeleton) == added(copy.deepcopy(layers_of(original)))


def test_computing_and_merging_are_refused(skeleton: nn.ModuleList):
    linear = next(module for module in skeleton.modules() if isinstance(module, LINEAR))
    with pytest.raises(UnsupportedOperation, match="computed by servers"):
        linear(torch.zeros(1, 32))
    for change in (
        lambda: linear.weight.data.clone(),
        lambda: setattr(linear.weight, "data", torch.zeros(1)),
        lambda: linear.weight.data.__iadd__(1),
    ):
        with pytest.raises(UnsupportedOperation, match="servers hold these weights"):
            change()
