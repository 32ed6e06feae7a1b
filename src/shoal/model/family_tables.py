"""What is known about families and their weights without asking their classes. It imports nothing slow.

The tables that need the classes, or that go with them, are in `shoal.model.families`.
"""

from __future__ import annotations

from shoal.errors import UnsupportedModel

# Families that pass every check of the parity suite. docs/models.md lists the checks.
CERTIFIED = frozenset(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid beam biogpt bitnet bloom codegen cohere cohere2
    cohere2_moe cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe
    lfm3 llama llama4_text mamba mamba2 mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3
    olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
    """.split()  # noqa: SIM905
)

# Vision-language models whose language model may be used alone: without images it gives the same results.
CERTIFIED_WITH_VISION = frozenset({"gemma3", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe"})

LINEARS_READ_DIRECTLY = frozenset({"dt_proj", "weights_proj"})
"""Names of linear layers whose weights some families read in every call (Mamba's `dt_proj.weight @ time_step`).
They are not packed, because unpacking such a weight each time would cost more than packing gains."""

OWN_LINEARS = frozenset({"falcon"})
"""Families whose linear layers are of a class of their own, which is not quantized."""

DEQUANTIZED_ON_CPU = frozenset({"fp8", "mxfp4"})
"""Quantization methods of checkpoints that have no CPU kernel: Transformers dequantizes their weights at loading."""


def uncertified(model_type: str) -> UnsupportedModel:
    """The error for a family that has not passed the parity suite."""
    return UnsupportedModel(
        f"the family {model_type!r} is not certified to give the same outputs when it is cut into blocks",
        hint="docs/models.md lists the certified families; --allow-uncertified tries anyway",
    )
