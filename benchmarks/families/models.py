"""Models of many families in the shapes of real ones, with random weights, small enough for a benchmark.

The width, the heads, the states and the kinds of blocks are those of the named model. There are fewer blocks, and fewer
experts, so that a model has 0.2 to 1 B weights in its blocks. The vocabulary is small, because heads are measured by
other benchmarks.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 32_000
GATED_DELTA: Mapping[str, Any] = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
THREE_LINEAR_ONE_FULL = ["linear_attention"] * 3 + ["full_attention"]
LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

# By family: the model whose shapes these are, and the fields of its config.
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": (
        "TinyLlama 1.1B",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32,
         "num_key_value_heads": 4},
    ),
    "qwen3_moe": (
        "Qwen3-30B-A3B",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 8},
    ),
    "bloom": ("BLOOM-1b1", {"hidden_size": 1536, "n_layer": 24, "n_head": 16}),
    "falcon": (
        "Falcon-RW-1B",
        {"hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 32, "alibi": True, "multi_query": False,
         "parallel_attn": False, "bias": True},
    ),
    "mpt": ("MPT-1B", {"d_model": 2048, "n_layers": 12, "n_heads": 16}),
    "stablelm": (
        "StableLM-2-1.6B",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32,
         "num_key_value_heads": 32, "use_qkv_bias": True},
    ),
    "nemotron": (
        "Minitron-4B",
        {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 8, "num_attention_heads": 24,
         "num_key_value_heads": 8, "head_dim": 128},
    ),
    "qwen3_5_text": (
        "Qwen3.5-0.8B",
        {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 256, "linear_num_value_heads": 16, **GATED_DELTA},
    ),
    "qwen3_next": (
        "Qwen3-Next-80B-A3B",
        {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 2,
         "head_dim": 256, "linear_num_value_heads": 32, "num_experts": 16, "num_experts_per_tok": 10,
         "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, **GATED_DELTA},
    ),
    "kimi_linear": (
        "Kimi-Linear-48B-A3B",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 4, "num_attention_heads": 32,
         "num_key_value_heads": 32, "num_experts": 16, "num_experts_per_token": 8, "moe_intermediate_size": 1024,
         **LATENT},
    ),
    "granitemoehybrid": (
        "Granite-4.0-H-1B",
        {"hidden_size": 1536, "shared_intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 48,
         "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
         "layer_types": (["mamba"] * 5 + ["attention"]) * 2, "position_embedding_type": "nope"},
    ),
    "lfm2": (
        "LFM2-700M",
        {"hidden_size": 1536, "intermediate_size": 10240, "num_hidden_layers": 12, "num_attention_heads": 24,
         "num_key_value_heads": 8, "layer_types": (["conv", "conv", "full_attention"]) * 4},
    ),
    "nemotron_h": (
        "Nemotron-H-4B",
        {"hidden_size": 3072, "intermediate_size": 12288, "layers_block_type": ["mamba", "mlp"] * 3
         + ["attention", "mlp"], "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "mamba_num_heads": 112, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8},
    ),
    "jamba": (
        "Jamba-Reasoning-3B",
        {"hidden_size": 2560, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 20,
         "num_key_value_heads": 1, "num_experts": 1, "attn_layer_period": 8, "attn_layer_offset": 4,
         "mamba_d_state": 16, "mamba_dt_rank": 160},
    ),
    "mamba2": (
        "Mamba2-370m",
        {"hidden_size": 1024, "num_hidden_layers": 48, "num_heads": 32, "head_dim": 64, "state_size": 128,
         "n_groups": 1},
    ),
    "deepseek_v32": (
        "DeepSeek-V3.2, of a third of its width",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32,
         "num_key_value_heads": 32, "q_lora_rank": 1536, "n_routed_experts": 16, "num_experts_per_tok": 8,
         "moe_intermediate_size": 1024, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, **LATENT},
    ),
    "llama4_text": (
        "Llama-4-Scout, of 0.4 of its width",
        {"hidden_size": 2048, "intermediate_size": 2048, "intermediate_size_mlp": 4096, "num_hidden_layers": 8,
         "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 8},
    ),
}  # fmt: skip


@contextlib.contextmanager
def family_model(family: str) -> Iterator[Path]:
    """The folder of a model of a family, in bf16. It is removed with the context."""
    _, changes = SHAPES[family]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, tie_word_embeddings=True, **tokens, **changes)
    folder = Path(tempfile.mkdtemp(prefix=f"shoal-{family}-"))
    try:
        torch.manual_seed(0)
        # Random numbers are made several times faster in float32.
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16).save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder)
