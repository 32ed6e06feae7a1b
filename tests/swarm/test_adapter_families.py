"""LoRA in every kind of block: losses, gradients and tokens in three spans equal those of PEFT on one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from .harness import swarm_of
from .test_adapters import adapted, close
from .tiny_models import VOCABULARY, tiny_config, tiny_model

TOKENS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

TARGETS: dict[str, str | list[str]] = {
    "bloom": "all-linear",  # an attention of its own, fused projections
    "falcon": "all-linear",
    "gemma3_text": "all-linear",
    "gpt2": "all-linear",  # Conv1D
    "gpt_neox": "all-linear",
    "gpt_oss": "all-linear",  # sinks; experts
    "llama": "all-linear",
    "olmo2": "all-linear",
    "opt": "all-linear",  # projections around the blocks
    "phi3": "all-linear",  # fused projections
    "qwen3": "all-linear",
    # For these, PEFT's "all-linear" includes the experts, which are not linear layers.
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],  # latent attention
    "hunyuan_v1_moe": [*ATTENTION, "wg"],  # a router that asks for its weight's dtype
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "qwen3_next": [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"],  # recurrent state
    # For these, it includes layers that PEFT refuses.
    "mamba": ["in_proj", "x_proj", "dt_proj"],  # the code reads the weight of dt_proj, so it gets no gradient
}


def factors_of(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def gradients_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """The gradients of all factors that the computation used."""
    return {name: each.grad for name, each in factors_of(model).items() if each.grad is not None}


def generate(model: Any) -> list[list[int]]:
    """The tokens of greedy generation after a prompt."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens: list[list[int]] = model.generate(input_ids=TOKENS[:, :5], **options).tolist()
    return tokens


@pytest.mark.parametrize("family", TARGETS)
def test_lora_in_a_swarm_gives_the_results_of_peft_on_one_machine(family: str, tmp_path: Path):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    plain = generate(whole)
    config: Callable[[], LoraConfig] = lambda: LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[family])  # noqa: E731
    theirs = adapted(whole, config())
    with swarm_of(tmp_path, "0:1", "1:3", "3:5") as net:
        ours = adapted(net.model(), config())
        assert factors_of(ours).keys() == factors_of(theirs).keys()
        losses = [model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss for model in (ours, theirs)]
        for loss in losses:
            loss.backward()
        assert close(*losses)
        found, expected = gradients_of(ours), gradients_of(theirs)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert expected[name].any(), f"{name} has no part in the loss: nothing is compared"
            assert close(gradient, expected[name]), name
        assert generate(ours) == generate(theirs) != plain
