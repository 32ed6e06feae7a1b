"""Adapters of strangers: each field that counts has bounds, and nothing is made that the file does not hold."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from shoal import UserError
from shoal.model.peft.peft_config import checked_fields
from shoal.model.peft.peft_folder import CONFIG, PREFIX, WEIGHTS, PeftFolder

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=2, **sizes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the tiny model, as PEFT saves it."""
    get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
        LoraConfig(target_modules=["q_proj"], use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
        LoraConfig(target_modules=r".*layers\.[12]\.mlp\.(up|down)_proj", init_lora_weights="gaussian"),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1], layers_pattern="layers"),
        LoraConfig(target_modules=["lm_head"], modules_to_save=["score"], trainable_token_indices=[3]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
)
def test_what_peft_saves_is_taken(config: LoraConfig | IA3Config, tmp_path: Path):
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    found = checked_fields("a", saved)
    assert found["inference_mode"]
    assert all(saved[name] == value for name, value in found.items() if name != "inference_mode")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 100_000_000}, "a wrong r:"),
        ({"r": 0}, "a wrong r:"),
        ({"r": True}, "a wrong r:"),
        ({"r": "8"}, "a wrong r:"),
        ({"rank_pattern": {"q_proj": 1 << 40}}, "a wrong rank_pattern:"),
        ({"rank_pattern": {f"q{index}": 1 for index in range(2000)}}, "a wrong rank_pattern:"),
        ({"lora_alpha": 1e30}, "a wrong lora_alpha:"),
        ({"lora_alpha": float("nan")}, "a wrong lora_alpha:"),
        ({"lora_dropout": 1.0}, "a wrong lora_dropout:"),
        ({"target_modules": ["q_proj"] * 2000}, "a wrong target_modules:"),
        ({"target_modules": [["q_proj"]]}, "a wrong target_modules:"),
        ({"target_modules": "(a+)+$"}, "a wrong target_modules:"),
        ({"target_modules": ".*" * 6}, "a wrong target_modules:"),
        ({"target_modules": "("}, "a wrong target_modules:"),
        ({"exclude_modules": "(a|a)*b"}, "a wrong exclude_modules:"),
        ({"alpha_pattern": {"(a+){9}": 1}}, "a wrong alpha_pattern:"),
        ({"layers_pattern": "(x*)*"}, "a wrong layers_pattern:"),
        ({"layers_to_transform": [1 << 30]}, "a wrong layers_to_transform:"),
        ({"layers_to_transform": [-1]}, "a wrong layers_to_transform:"),
        ({"trainable_token_indices": [0] * 100_000}, "a wrong trainable_token_indices:"),
        ({"init_lora_weights": "pissa"}, "a wrong init_lora_weights:"),
        ({"layer_replication": [[0, 1000]]}, "sets 'layer_replication'"),
        ({"eva_config": {"rho": 2.0}}, "sets 'eva_config'"),
        ({"use_qalora": True}, "sets 'use_qalora'"),
        ({"of_tomorrow": 1}, "sets 'of_tomorrow'"),
        ({"peft_type": "VERA"}, "of another kind: 'VERA'"),
        ({"peft_type": ["LORA"]}, "of another kind"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_one_line(fields: dict[str, Any], named: str):
    with pytest.raises(UserError) as refusal:
        checked_fields("someone/adapter", LORA | fields)
    message = str(refusal.value)
    assert message.startswith("the adapter someone/adapter ")
    assert named in message
    assert "\n" not in message
    assert len(message) < 300


def test_a_rank_that_the_file_does_not_have_is_no_reason_to_make_it(folder: Path):
    change(folder, r=4096)
    with pytest.raises(UserError, match="does not fit the model"):
        PeftFolder.open(folder).put_into(tiny_llama())


def test_layers_of_which_the_file_has_no_weights_are_refused(folder: Path):
    change(folder, target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match=r"lacks 4 of its weights, such as model\.layers\.0\.self_attn\.v_proj\.lora_A"):
        PeftFolder.open(folder).put_into(tiny_llama())


def test_weights_of_the_model_itself_are_not_overwritten(folder: Path):
    model = tiny_llama()
    name, before = "model.norm.weight", model.model.norm.weight.clone()
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {f"{PREFIX}{name}": before.clone()}, folder / WEIGHTS)
    assert PeftFolder.open(folder).put_into(copy.deepcopy(model)) == []
    save_file(weights | {f"{PREFIX}{name}": before + 1}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"other values for the model's own model\.norm\.weight"):
        PeftFolder.open(folder).put_into(model)
    assert torch.equal(model.model.norm.weight, before)


def test_an_absurd_config_is_refused_before_the_weights_are_read(folder: Path):
    change(folder, r=100_000_000)
    (folder / WEIGHTS).write_bytes(b"not read")
    with pytest.raises(UserError, match="a wrong r"):
        PeftFolder.open(folder)


def test_damaged_weights_and_whole_numbers_are_refused(folder: Path):
    save_file({"base_model.model.a": torch.ones(2, dtype=torch.int64)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="holds no factors"):
        PeftFolder.open(folder)
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="damaged"):
        PeftFolder.open(folder)


def test_a_model_that_is_trained_further_leaves_the_folder_as_it_was(folder: Path):
    opened, model = PeftFolder.open(folder), tiny_llama()
    before = {name: weight.clone() for name, weight in opened.weights.items()}
    opened.put_into(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    assert all(torch.equal(opened.weights[name], weight) for name, weight in before.items())
