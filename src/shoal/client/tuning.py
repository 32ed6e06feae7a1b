"""What is added to a model when it is opened: an adapter of others, or soft prompts to be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shoal.errors import UserError
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.peft.prompts import PROMPT, new_prompt


def add_adapter(model: Any, adapter: PeftFolder) -> None:
    """A trained adapter, which is not sent to servers that host it."""
    if strange := adapter.put_into(model):
        raise UserError(f"the adapter {adapter.origin} is another model's: this one has no {strange[0]}")
    model.blocks.note_hosted(adapter.name)


def add_prompts(model: Any, num_tokens: int, *, deep: bool) -> None:
    """Soft prompts, which are trained together with the head of a task, if there is one; everything else is frozen."""
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
