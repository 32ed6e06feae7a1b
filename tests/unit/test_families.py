from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from shoal.errors import UnsupportedModel
from shoal.model.families import CERTIFIED, PACKED, Family, family_of

MODELS = Path(__file__).parents[2] / "docs" / "models.md"


def tiny(model_type: str) -> Family:
    return family_of(CONFIG_MAPPING[model_type](num_hidden_layers=4))


@pytest.mark.parametrize(
    ("model_type", "name", "block"),
    [
        ("llama", "model.layers.3.mlp.up_proj.weight", 3),
        ("llama", "layers.3.mlp.up_proj.weight", 3),  # saved from the base model
        ("llama", "model.layers.12.mlp.up_proj.weight", 12),
        ("llama", "model.language_model.layers.3.mlp.up_proj.weight", 3),  # saved from a vision-language model
        ("llama", "language_model.model.layers.3.mlp.up_proj.weight", 3),
        ("llama", "vision_tower.layers.3.mlp.up_proj.weight", None),
        ("llama", "vision_tower.encoder.layers.3.mlp.up_proj.weight", None),
        ("llama", "mtp.layers.0.mlp.up_proj.weight", None),
        ("llama", "model.embed_tokens.weight", None),
        ("llama", "lm_head.weight", None),
        ("gpt2", "h.0.ln_1.weight", 0),
        ("gpt2", "transformer.h.0.ln_1.weight", 0),
        ("gpt2", "transformer.ln_f.weight", None),
        ("opt", "model.decoder.layers.1.fc1.weight", 1),
        ("opt", "decoder.layers.1.fc1.weight", 1),
        ("opt", "encoder.layers.1.fc1.weight", None),
    ],
)
def test_the_block_of_a_tensor_is_found_by_its_name(model_type: str, name: str, block: int | None) -> None:
    assert tiny(model_type).block_of(name) == block


def test_a_block_is_found_when_the_checkpoint_has_another_name_for_the_backbone() -> None:
    family = family_of(CONFIG_MAPPING["nemotron_h"](layers_block_type=["mamba", "attention", "mlp"]))
    assert family.backbone_path == "model"
    assert family.block_of("backbone.layers.2.mixer.A_log") == 2
    assert family.name_in_backbone("backbone.layers.2.mixer.A_log") == "layers.2.mixer.A_log"


def test_a_family_that_is_not_certified_is_refused_in_one_line_with_a_hint() -> None:
    config = CONFIG_MAPPING["ctrl"](n_layer=2)
    with pytest.raises(UnsupportedModel, match=r"'ctrl' is not certified") as refusal:
        family_of(config)
    assert "\n" not in str(refusal.value)
    assert "--allow-uncertified" in (refusal.value.hint or "")
    assert family_of(config, allow_uncertified=True).layers_name == "h"


def test_a_model_without_a_list_of_blocks_is_refused_even_if_uncertified_families_are_allowed() -> None:
    with pytest.raises(UnsupportedModel):
        family_of(CONFIG_MAPPING["bert"](num_hidden_layers=2), allow_uncertified=True)
    with pytest.raises(UnsupportedModel):
        family_of(CONFIG_MAPPING["clip"](), allow_uncertified=True)


ROTARY = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3"])
def test_sequences_are_packed_if_rotary_embeddings_depend_only_on_positions(rope_type: str) -> None:
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    rope = {"rope_type": rope_type, **ROTARY, **frequencies}
    assert family_of(CONFIG_MAPPING["llama"](num_hidden_layers=2, rope_parameters=rope)).packable


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_sequences_are_not_packed_if_rotary_embeddings_depend_on_the_longest(rope_type: str) -> None:
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32} if rope_type == "longrope" else {}
    rope = {"rope_type": rope_type, **ROTARY, **factors}
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4}
    assert not family_of(CONFIG_MAPPING["llama"](**sizes, rope_parameters=rope)).packable


def test_sequences_are_not_packed_if_one_kind_of_layer_depends_on_the_longest() -> None:
    usual = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=6)
    rope = {kind: dict(parameters) for kind, parameters in usual.rope_parameters.items()}
    assert family_of(usual).packable
    rope["full_attention"] |= {"rope_type": "dynamic", "factor": 4.0}
    assert not family_of(CONFIG_MAPPING["gemma3_text"](num_hidden_layers=6, rope_parameters=rope)).packable


def test_every_packed_family_is_certified() -> None:
    assert PACKED <= CERTIFIED


def test_docs_models_lists_the_certified_and_the_packed_families() -> None:
    """If this fails, run tests/swarm/test_parity.py, which writes the page."""
    table = re.findall(r"^\| `([^`]+)` \|.*?\|.*?\| (packed|in batches) \|", MODELS.read_text(), flags=re.MULTILINE)
    assert {family for family, computed in table if computed == "packed"} == PACKED
    assert set(re.findall(r"^\| `([^`]+)`", MODELS.read_text(), flags=re.MULTILINE)) == CERTIFIED
