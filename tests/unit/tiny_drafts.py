"""Small models of several kinds, which guess for texts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

NUM_WORDS = 50
SIZES = {
    "vocab_size": NUM_WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.4,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def tiny(kind: str, **options: Any) -> Any:
    """A model of this kind with random weights. `options` go before `SIZES`."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **options})).eval()
