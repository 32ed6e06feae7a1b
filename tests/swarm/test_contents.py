"""What a model takes, by its headers alone: the same as what its class says, for every certified family."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import CheckpointError, UnsupportedModel, UserError
from shoal.model.families import CERTIFIED
from shoal.model.linear.quantization import Quantization, dequantized_bytes, quantizable_weights
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.contents import Contents, is_linear
from shoal.server.capacity import block_bytes, bytes_of_token, memory_for_blocks
from shoal.server.config import ServerConfig
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.spans import Span

from .tiny_models import tiny_config, tiny_model

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_ROUTERS = 2 * 5 * 4 * 32
"""The weights of a tiny model's routers: some families have them as linear layers, and they do not count here."""
CACHE_FACTOR = {"jetmoe": 2.0, "mimo_v2_flash": 1.4}
"""Families that cache more than their configs say in the usual words, and by how much."""


@pytest.mark.parametrize("model_type", sorted(CERTIFIED))
def test_headers_tell_what_the_class_of_a_model_tells(model_type: str, tmp_path: Path) -> None:
    tiny_model(tiny_config(model_type)).save_pretrained(tmp_path)
    checkpoint, contents = Checkpoint.open(tmp_path), Contents.open(tmp_path)
    assert (contents.key, contents.num_blocks) == (checkpoint.key, checkpoint.num_blocks)
    assert contents.model_type == checkpoint.family.model_type
    assert contents.head_bytes("float32") == checkpoint.head_bytes
    assert contents.output_bytes("float32") == 4 * 96 * checkpoint.config.hidden_size
    for name, dtype in DTYPES.items():
        for quantization in Quantization:
            assert contents.block_bytes(name, quantization.value) == block_bytes(checkpoint, dtype, CPU, quantization)

    by_name = sum(
        math.prod(tensor.shape)
        for name, tensor in contents.tensors.items()
        if checkpoint.family.block_of(name) is not None and is_linear(model_type, name, tensor)
    )
    assert by_name == pytest.approx(linear_weights(checkpoint), rel=0.02, abs=MOST_ROUTERS)


def linear_weights(checkpoint: Checkpoint) -> int:
    """The weights that a server quantizes, by the class of the model."""
    with torch.device("meta"):
        backbone = checkpoint.family.backbone(checkpoint.config)
    return sum(
        backbone.get_parameter(name).numel() for name in quantizable_weights(checkpoint.family, checkpoint.config)
    )


def test_configs_tell_what_blocks_cache(tmp_path: Path) -> None:
    for model_type in sorted(CERTIFIED):
        folder = tmp_path / model_type
        tiny_model(tiny_config(model_type)).save_pretrained(folder)
        checkpoint = Checkpoint.open(folder)
        body = load_body(checkpoint, Span(0, checkpoint.num_blocks), dtype=torch.float32)
        shapes = cache_shapes(body)
        has_indexer = any(shape.indexer is not None for shape in shapes.tokens.values())
        if not shapes.states and not has_indexer:  # of these, the configs give an upper bound
            in_blocks, _ = bytes_of_token(body, shapes, torch.float32)
            of_block = CACHE_FACTOR.get(model_type, 1.0) * Contents.open(folder).cache_bytes("float32")
            assert in_blocks / checkpoint.num_blocks == pytest.approx(of_block, rel=0.01), model_type


def test_a_token_needs_the_experts_that_are_chosen_for_it(tmp_path: Path) -> None:
    tiny_model(tiny_config("mixtral")).save_pretrained(tmp_path)
    contents = Contents.open(tmp_path)
    experts = sum(tensor.nbytes for name, tensor in contents.tensors.items() if ".experts." in name)
    whole = sum(contents.block_bytes("float32"))
    assert contents.read_bytes("float32") * contents.num_blocks == whole - experts / 2  # 2 of 4
    assert contents.used_weights * contents.num_blocks == (whole - experts / 2) / 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def changed(folder: Path, **changes: Any) -> Path:
    """A copy of a model with another config."""
    copy = folder.with_name("changed")
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_weights_that_are_quantized_already_are_held_as_they_are(folder: Path) -> None:
    contents = Contents.open(changed(folder, quantization_config={"quant_method": "gptq"}))
    assert contents.stored == "gptq"
    assert contents.block_bytes("bfloat16", "nf4") == Contents.open(folder).block_bytes("float32")


def test_weights_without_a_kernel_for_processors_are_held_as_ordinary_ones(folder: Path) -> None:
    contents = Contents.open(changed(folder, quantization_config={"quant_method": "fp8"}))
    checkpoint = Checkpoint.open(folder)
    assert contents.block_bytes("bfloat16") == dequantized_bytes(checkpoint.family, checkpoint.config, torch.bfloat16)


@pytest.mark.parametrize("num_blocks", [6, 10**9])
def test_a_config_with_more_blocks_than_there_are_is_refused(folder: Path, num_blocks: int) -> None:
    with pytest.raises(CheckpointError, match=f"has {num_blocks} blocks by its config.json, but no tensor of block 5"):
        Contents.open(changed(folder, num_hidden_layers=num_blocks))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "5", None, 1 << 40, True])
def test_a_config_with_a_size_that_is_none_is_refused(folder: Path, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match="describes no model"):
        Contents.open(changed(folder, hidden_size=wrong))


def test_a_family_that_is_not_certified_is_refused(folder: Path) -> None:
    strange = changed(folder, model_type="dbrx")
    with pytest.raises(UnsupportedModel, match="'dbrx' is not certified"):
        Contents.open(strange)
    assert Contents.open(strange, allow_uncertified=True).num_blocks == 5


@pytest.mark.parametrize("in_file", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("named", [None, "bfloat16", "float32"])
def test_blocks_take_what_they_take_when_loaded_whatever_dtype_their_file_and_config_have(
    in_file: torch.dtype, named: str | None, tmp_path: Path
) -> None:
    tiny_model(tiny_config("llama")).to(in_file).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert str(in_file) == f"torch.{config.pop('dtype')}"
    (tmp_path / "config.json").write_text(json.dumps(config if named is None else config | {"dtype": named}))
    checkpoint, contents = Checkpoint.open(tmp_path), Contents.open(tmp_path)
    assert contents.dtype == (named or "float32")
    for name, dtype in DTYPES.items():
        layers = load_body(checkpoint, Span(0, checkpoint.num_blocks), dtype=dtype).backbone.layers
        loaded = tuple(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)
        assert contents.block_bytes(name) == block_bytes(checkpoint, dtype, CPU, Quantization.NONE) == loaded
        head = sum(math.prod(contents.tensors[name].shape) for name in contents.tensors if ".layers." not in name)
        config_of_server = ServerConfig("m", serve_head=True)
        assert contents.head_bytes(name) == head * dtype.itemsize
        assert memory_for_blocks(config_of_server, checkpoint, dtype, 10**9) == 10**9 - head * dtype.itemsize


@pytest.mark.parametrize("odd", [{"a": 1}, ["llama"], 7, None], ids=str)
def test_a_family_that_is_no_text_is_refused_and_a_dtype_that_is_none_is_ignored(folder: Path, odd: Any) -> None:
    assert Contents.open(changed(folder, dtype=odd, torch_dtype="bfloat16")).dtype == "bfloat16"
    shutil.rmtree(folder.with_name("changed"))
    strange = changed(folder, model_type=odd)
    for allow_uncertified in (False, True):
        with pytest.raises(UnsupportedModel, match="is not certified"):
            Contents.open(strange, allow_uncertified=allow_uncertified)


@pytest.mark.parametrize("odd", [{"model_type": ["llama"]}, {"model_type": {"a": 1}}, {"dtype": {"a": 1}}], ids=str)
def test_a_server_refuses_an_odd_config_in_one_line(folder: Path, odd: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        Checkpoint.open(changed(folder, **odd))
    assert "\n" not in str(refused.value)
