"""Checkpoints with a vision tower: their language model can be served and gives the results of the whole model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from shoal.errors import UnsupportedModel
from shoal.model.body import build_body
from shoal.model.families import CERTIFIED_WITH_VISION, family_of, text_config
from shoal.model.head import build_head
from shoal.spans import Span

from .local_blocks import LocalBlocks
from .parity import PROMPT, assert_equal, generate
from .tiny_models import VOCABULARY, tiny_config, with_noise

LANGUAGE_MODELS = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 5,  # as many as in the language model, but these are not its blocks
    "depth": 5,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "out_hidden_size": 32,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}


def config_with_vision(model_type: str) -> PreTrainedConfig:
    usual = CONFIG_MAPPING[model_type]().vision_config
    return CONFIG_MAPPING[model_type](
        text_config=tiny_config(LANGUAGE_MODELS[model_type]).to_dict(),
        vision_config={"model_type": usual.model_type, **{k: v for k, v in EYES.items() if hasattr(usual, k)}},
        image_token_id=VOCABULARY - 1,
        image_token_index=VOCABULARY - 1,
    )


def test_every_certified_vision_model_is_tested() -> None:
    assert set(LANGUAGE_MODELS) == CERTIFIED_WITH_VISION


@pytest.mark.parametrize("model_type", sorted(LANGUAGE_MODELS))
def test_the_language_model_of_a_vision_checkpoint_gives_the_results_of_the_whole_model(model_type: str) -> None:
    config = config_with_vision(model_type)
    torch.manual_seed(0)
    model = with_noise(AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        whole = type(model).from_pretrained(folder, dtype=torch.float32)
        files = sorted(Path(folder).glob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    family = family_of(config)
    spans = [Span(0, 2), Span(2, 5)]
    bodies = [build_body(family, config, span, tensors, dtype=torch.float32) for span in spans]
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config(config))]
    blocks = LocalBlocks(list(zip(bodies, spans, strict=True)))
    cut = build_head(language_model, family, config, tensors, blocks=blocks, dtype=torch.float32)

    with torch.no_grad():
        assert_equal(cut(PROMPT).logits, whole(PROMPT).logits)
    assert torch.equal(generate(cut, inputs=PROMPT).sequences, generate(whole, inputs=PROMPT).sequences)


def test_a_model_whose_vision_part_changes_the_attention_to_text_is_refused() -> None:
    config = CONFIG_MAPPING["paligemma"]()  # attends in both directions within a prompt
    with pytest.raises(UnsupportedModel, match="'paligemma'"):
        family_of(config)


def test_a_vision_language_class_is_refused() -> None:
    config = config_with_vision("gemma3")
    with pytest.raises(UnsupportedModel, match="more than a language model"):
        build_head(
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)],
            family_of(config),
            config,
            {},
            blocks=LocalBlocks([]),
            dtype=torch.float32,
        )
