"""What is added to a model: a trained adapter, or soft prompts to train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.errors import UserError
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.peft.prompts import PROMPT, new_prompt


def add_adapter(model: Any, adapter: PeftFolder) -> None:
    """Add a trained adapter, which is not sent to servers that host it. Raises `UserError` if it does not fit."""
    if strange := adapter.put_into(model):
        raise UserError(f"the adapter {adapter.origin} is for another model: this one has no {strange[0]}")
    model.blocks.note_hosted(adapter.name)


def twin_with_adapter(model: Any, adapter: str | Path | PeftFolder, **where: Any) -> Any:
    """A copy of a model that computes with an adapter, and shares the model's weights and its place in the swarm.

    `where` are options of `PeftFolder.open`. Raises `UserError` if the adapter does not fit, or the model has one.
    """
    if model.blocks.is_tuned:
        raise UserError("this model has an adapter or prompts already", hint="ask the model without it for its twin")
    found = adapter if isinstance(adapter, PeftFolder) else PeftFolder.open(adapter, **where)
    ends = [module for module in model.modules() if module._parameters and not module._modules]
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    twin = copy.deepcopy(model, {id(module): module for module in ends})
    try:
        add_adapter(twin, found)
    except BaseException:
        twin.close()
        raise
    finally:
        for parameter, wanted in trainable.items():  # PEFT freezes what it is put into
            parameter.requires_grad_(wanted)
    return twin


def add_prompts(model: Any, num_tokens: int, *, deep: bool) -> None:
    """Add a soft prompt of `num_tokens` tokens, and with `deep` one in every block too.

    They are trained together with the head of a task, if there is one. All other parameters are frozen.
    """
    model.requires_grad_(False)
    if not model.can_generate():
        known = {id(parameter) for parameter in model.base_model.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in known)
    prompt = new_prompt(model.get_input_embeddings(), num_tokens)
    model.backbone.add_module(PROMPT, prompt)
    model.blocks.num_prompt_tokens = num_tokens
    if deep:
        for _, skeleton in model.blocks.named_children():
            skeleton.register_parameter(PROMPT, nn.Parameter(torch.zeros_like(prompt.weight)))
