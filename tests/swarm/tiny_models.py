"""A tiny random model of any family, with every kind of block of the family in five blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

NUM_BLOCKS = 5
VOCABULARY = 96

# Sizes by the names of their config fields. A config takes those that it has.
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": NUM_BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    # recurrent state
    "state_size": 4,
    "conv_kernel": 3,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
}

LATENT = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads
# Enough heads that no two keys have equal scores: the choice between equal ones depends on the number of keys.
INDEXED = {**LATENT, "index_topk": 4, "index_n_heads": 16, "index_head_dim": 16}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 4}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONVOLUTION_AND_FULL = ["conv", "full_attention", "conv", "conv", "full_attention"]

# Further fields of families: they make blocks differ from each other, and multipliers differ from 1.
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "axk1": LATENT,
    "axk2": INDEXED,
    "bailing_hybrid": LATENT,
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    "falcon": {"multi_query": False},
    "falcon_h1": {**MAMBA2, "embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
    "glm4_moe_lite": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granite": MULTIPLIERS,
    "granitemoe": MULTIPLIERS,
    "granitemoeshared": MULTIPLIERS,
    "granitemoehybrid": {
        **MULTIPLIERS,
        **MAMBA2,
        "layer_types": ["mamba", "attention", "mamba", "mamba", "attention"],
        "shared_intermediate_size": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": CONVOLUTION_AND_FULL},
    "lfm2_moe": {"layer_types": CONVOLUTION_AND_FULL, "num_dense_layers": 1},
    "llama4_text": {"attention_chunk_size": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 4},
    "minicpm3": LATENT,
    "mpt": {"max_seq_len": 64},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen2": {"use_sliding_window": True, "layer_types": SLIDING_AND_FULL},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3": {"use_sliding_window": True, "layer_types": SLIDING_AND_FULL},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "xglm": {"ffn_dim": 48},
    "youtu": LATENT,
}

# Variants of families that are checked as well.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "falcon": {
        "alibi": {"alibi": True, "multi_query": False},
        "new decoder architecture": {"new_decoder_architecture": True, "num_kv_heads": 2},
    },
    "gpt2": {"scaled by depth": {"scale_attn_by_inverse_layer_idx": True}},
    "opt": {"norm first": {"do_layer_norm_before": True, "word_embed_proj_dim": 32}},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model that has all kinds of blocks of the family."""
    config_class = CONFIG_MAPPING[model_type]
    usual = config_class()
    known = {name: value for name, value in SIZES.items() if is_settable(usual, name)}
    kinds = list(dict.fromkeys(getattr(usual, "layer_types", None) or ()))
    if len(kinds) > 1 and is_settable(usual, "layer_types"):
        known["layer_types"] = [kinds[block % len(kinds)] for block in range(NUM_BLOCKS)]
    return config_class(**{**known, **SPECIAL.get(model_type, {}), **changes})


def is_settable(config: PreTrainedConfig, name: str) -> bool:
    """Whether a config has this field and does not compute it from others."""
    computed = getattr(type(config), config.attribute_map.get(name, name), None)
    return hasattr(config, name) and not (isinstance(computed, property) and computed.fset is None)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A complete random model."""
    torch.manual_seed(0)
    return with_noise(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


@torch.no_grad()
def with_noise(model: PreTrainedModel) -> PreTrainedModel:
    """Add noise to all parameters, because norms and biases are initialized with ones and zeros."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
