"""Soft prompts: trained vectors before the input (arXiv 2104.08691) and in every block (arXiv 2110.07602).

The client holds them. The prompt of the input precedes the embeddings of the tokens, also before padding, and is
computed like tokens. The model's code outside of the backbone does not see it. The prompts of the blocks are added to
the hidden states of the same positions, in the blocks (`shoal.model.peft.block_adapters`).
"""

# B rows, T new tokens, P tokens of the prompt, D hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import UserError

PROMPT = "soft_prompt"
"""The name of the prompt's module in a client's backbone."""


def new_prompt(embeddings: nn.Module, num_tokens: int) -> nn.Embedding:
    """A new prompt in float32, drawn with the standard deviation of the model's embeddings."""
    weight: Tensor = embeddings.weight  # type: ignore[assignment]
    prompt = nn.Embedding(num_tokens, weight.shape[1], device=weight.device, dtype=torch.float32)
    nn.init.normal_(prompt.weight, std=float(weight.detach().float().std()))
    return prompt


def check_mode(mode: str | None, num_tokens: int) -> None:
    """Raise `UserError` for a tuning mode that does not exist, and for a mode without a length or the reverse."""
    if mode not in (None, "ptune", "deep_ptune"):
        raise UserError(f"no tuning mode is called {mode!r}", hint='use "ptune" or "deep_ptune"')
    if (mode is None) != (num_tokens == 0) or num_tokens < 0:
        raise UserError(
            "soft prompts have a mode and a length",
            hint='give both, such as tuning_mode="ptune", pre_seq_len=16, or neither',
        )


def with_prompt(arguments: dict[str, Any], prompt: nn.Embedding, embeddings: nn.Module, *, num_seen: int) -> bool:
    """Account for the prompt in the arguments of a backbone's call, which are changed.

    `num_seen` tokens precede the call in its session, not counting the prompt. If there are none, the prompt is
    inserted before the new tokens. Otherwise only mask and positions are extended. Returns whether the prompt was
    inserted.
    """
    num_prompt = prompt.num_embeddings
    ids = arguments.pop("input_ids", None)
    embeds: Tensor = embeddings(ids) if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    batch_size, num_tokens, _ = embeds.shape
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None:
        arguments["attention_mask"] = torch.cat((mask.new_ones(batch_size, num_prompt), mask), dim=1)
    if num_seen:
        if positions is None:
            positions = torch.arange(num_seen, num_seen + num_tokens, device=embeds.device)[None]
        arguments["position_ids"] = positions + num_prompt
    else:
        first_1P = torch.arange(num_prompt, device=embeds.device)[None]
        if positions is not None:
            arguments["position_ids"] = torch.cat(
                (first_1P.expand(positions.shape[0], -1), positions + num_prompt), dim=1
            )
        prompt_BPD = prompt.weight.to(embeds).expand(batch_size, -1, -1)
        embeds = torch.cat((prompt_BPD, embeds), dim=1)
    arguments["inputs_embeds"] = embeds
    return not num_seen


def without_prompt(output: Any, num_prompt: int) -> Any:
    """The output of a backbone without the positions of the prompt."""
    if isinstance(output, tuple):
        return (output[0][:, num_prompt:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, num_prompt:]
    return output
