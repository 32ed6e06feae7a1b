"""Automatic mixed precision is the client's: it rounds what is computed here; blocks stay as they are served."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from .harness import Swarm

TOKENS = torch.arange(3, 35).view(4, 8)


def tuned(model: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))


def with_exact_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """Plain Transformers whose blocks leave mixed precision, as if somebody else computed them."""
    for block in model.model.layers:
        block.forward = torch.autocast("cpu", enabled=False)(block.forward)
    return model


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["as it is", "scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_under_autocast_is_that_of_a_model_whose_blocks_are_exact(
    dtype: torch.dtype, scale: float | None, swarm: Callable[..., Swarm], whole: PreTrainedModel
):
    ours, theirs = tuned(swarm("0:2", "2:4").model()), tuned(with_exact_blocks(copy.deepcopy(whole)))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    found = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.1)
        with torch.autocast("cpu", dtype):
            output = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
        assert output.logits.dtype is dtype
        scaler.scale(output.loss).backward()
        scaler.unscale_(optimizer)
        found.append((output.loss, gradients(model)))
        scaler.step(optimizer)
        scaler.update()
    (loss, mine), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss)
    assert len(mine) == len(expected) == 4 * 7 * 2
    for gradient, expected_gradient in zip(mine.values(), expected.values(), strict=True):
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_a_gradient_that_overflows_is_seen_by_the_scaler_and_no_server_is_blamed(
    swarm: Callable[..., Swarm], caplog: pytest.LogCaptureFixture
):
    model = tuned(swarm("0:2", "2:4").model())
    trainable = [each for each in model.parameters() if each.requires_grad]
    before = [each.detach().clone() for each in trainable]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(each, was) for each, was in zip(trainable, before, strict=True))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
