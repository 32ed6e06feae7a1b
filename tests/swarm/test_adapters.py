"""A client's own layers in blocks that others hold: the same as with Transformers and PEFT on one machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from .harness import Swarm

TOKENS = torch.arange(3, 35).view(4, 8)
KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    "rsLoRA with a bias": lambda: LoraConfig(
        r=4, use_rslora=True, lora_bias=True, target_modules=["q_proj", "up_proj"]
    ),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "down_proj"]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoRA in some layers": lambda: LoraConfig(r=4, layers_to_transform=[1, 2], target_modules=["o_proj"]),
    "ranks by pattern": lambda: LoraConfig(r=2, rank_pattern={"q_proj": 6}, target_modules=["q_proj", "gate_proj"]),
}


def adapted(model: Any, config: Any, *, seed: int = 0) -> PeftModel:
    """A model with factors that are not zero, the same for each model."""
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (1 + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise).to(parameter.dtype)
    return tuned


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To a relative error of 1e-5 in norm, as gradients are measured."""
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training_is_that_of_peft_on_one_machine(
    kind: str, swarm: Callable[..., Swarm], whole: PreTrainedModel
):
    net = swarm("0:2", "2:4")
    ours = adapted(net.model(), KINDS[kind]())
    theirs = adapted(copy.deepcopy(whole), KINDS[kind]())
    losses = [model(input_ids=TOKENS, labels=TOKENS).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert close(*losses)
    mine, expected = (
        {name: each.grad for name, each in model.named_parameters() if each.requires_grad} for model in (ours, theirs)
    )
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert close(mine[name], gradient), name


def test_generation_with_an_adapter_is_that_of_peft_on_one_machine(swarm: Callable[..., Swarm], whole: PreTrainedModel):
    net = swarm("0:2", "2:4")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    model = net.model()
    plain = model.generate(TOKENS, max_new_tokens=20, do_sample=False)
    ours, theirs = adapted(model, config), adapted(copy.deepcopy(whole), config)
    for options in ({"do_sample": False}, {"num_beams": 3}):
        found = ours.generate(input_ids=TOKENS, max_new_tokens=20, **options)
        assert found.tolist() == theirs.generate(input_ids=TOKENS, max_new_tokens=20, **options).tolist()
        assert found.tolist() != plain.tolist()
    with ours.disable_adapter():
        assert ours.generate(input_ids=TOKENS, max_new_tokens=20, do_sample=False).tolist() == plain.tolist()
