"""A model of 4 blocks on disk, in the layout that a test needs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_tiny(folder: Path, *, sharded: bool = False, tied: bool = False, seed: int = 0) -> Path:
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    return folder
