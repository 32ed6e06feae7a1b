"""Quantized servers give the results of Transformers with the same settings on the blocks. Heads stay unquantized."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers import PreTrainedModel as Whole

from shoal.bundled import STORIES
from shoal.errors import UserError
from shoal.model import loading as load
from shoal.model.body import Body, joined_body
from shoal.model.families import CERTIFIED
from shoal.model.linear.packed_linear import FrozenLinear
from shoal.model.linear.quantization import Quantization, dequantized_bytes, quantizable_weights
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.capacity import max_num_blocks
from shoal.server.config import ServerConfig
from shoal.spans import Span

from .harness import swarm_of
from .tiny_models import tiny_config, tiny_model

KINDS = [Quantization.INT8, Quantization.NF4]
PROMPT = AutoTokenizer.from_pretrained(STORIES)("Once upon a time, there was a", return_tensors="pt").input_ids


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 blocks, of sizes that the kernels of bitsandbytes support."""
    path = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def settings(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def whole(folder: Path, kind: Quantization, dtype: torch.dtype) -> Whole:
    options = {"quantization_config": settings(kind, dtype), "device_map": {"": "cpu"}, "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def blocks_of(model: Whole, hidden: Tensor) -> Tensor:
    """The output of all blocks of a model for these hidden states."""
    outputs: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model.model(inputs_embeds=hidden)
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_swarm_decodes_the_tokens_of_transformers(kind: Quantization, dtype: str) -> None:
    # A trained model with confident predictions, because the 4-bit kernel computes in bfloat16 even for float32.
    expected = whole(STORIES, kind, getattr(torch, dtype)).generate(PROMPT, max_new_tokens=24, do_sample=False)
    with swarm_of(STORIES, "0:5", "5:12", quantization=kind.value, dtype=dtype) as swarm:
        assert [server.info.quantization for server in swarm.servers.values()] == [kind.value] * 2
        model = swarm.model(dtype=dtype)
        assert model.generate(PROMPT, max_new_tokens=24, do_sample=False).tolist() == expected.tolist()


def dequantized(body: Body) -> nn.Module:
    """The same blocks with ordinary linear layers that have the dequantized weights."""
    plain = {}
    for name, module in body.named_modules():
        if isinstance(module, FrozenLinear):
            linear = nn.Linear(module.in_features, module.out_features)
            linear.weight, linear.bias = nn.Parameter(module.weight.float(), requires_grad=False), module.bias
            plain[name] = linear
    for name, linear in plain.items():
        parent, _, child = name.rpartition(".")
        setattr(body.get_submodule(parent), child, linear)
    return body


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantized_blocks(folder: Path, kind: Quantization) -> None:
    checkpoint = Checkpoint.open(folder)
    torch.manual_seed(1)
    hidden, towards = torch.randn(2, 2, 6, 128)
    gradients = []
    for prepare in (lambda body: body, dequantized):
        body = load_body(checkpoint, Span(1, 4), dtype=torch.float32, quantization=kind)
        assert sum(isinstance(module, FrozenLinear) for module in body.modules()) == 3 * 7
        body(hidden)  # a pass without gradients, like the first one of a server
        body = prepare(body)
        x = hidden.clone().requires_grad_(True)
        body(x).backward(towards)
        gradients.append(x.grad)
    # Inputs of products are rounded to 8 bits, or to bfloat16 by the 4-bit kernel.
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_start_reads_the_blocks_that_the_first_one_quantized(
    folder: Path, cache: Path, kind: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(folder)
    hidden = torch.randn(1, 5, 128)

    def start(span: Span) -> Tensor:
        with torch.no_grad():
            return load_body(checkpoint, span, dtype=torch.float32, quantization=kind)(hidden)

    first = start(Span(1, 3))
    files = sorted(cache.glob("quantized/*/*"))
    assert [file.name for file in files] == ["block-1.safetensors", "block-2.safetensors"]
    with monkeypatch.context() as context:
        context.setattr(Checkpoint, "block_tensors", None)  # the original weights are not read
        assert torch.equal(start(Span(1, 3)), first)
    assert torch.isfinite(start(Span(0, 3))).all()  # block 0 is not cached yet
    files[0].write_bytes(files[0].read_bytes()[:-100])
    assert torch.equal(start(Span(1, 3)), first)
    assert set(load_file(files[0])) == {name.replace(".2.", ".1.") for name in load_file(files[1])}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_blocks_that_were_loaded_apart_compute_together(
    folder: Path, cache: Path, kind: Quantization
) -> None:
    checkpoint, hidden = Checkpoint.open(folder), torch.randn(1, 5, 128)

    def load_apart(*spans: Span) -> list[Body]:
        return [load_body(checkpoint, span, dtype=torch.float32, quantization=kind) for span in spans]

    (whole,) = load_apart(Span(1, 4))
    joined = joined_body(load_apart(Span(0, 2), Span(2, 3), Span(3, 4)), Span(1, 4))
    with torch.no_grad():
        assert torch.equal(joined(hidden), whole(hidden))


def test_quantization_works_if_the_cache_cannot_be_written(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(load, "save_file", fail)
    body = load_body(Checkpoint.open(folder), Span(0, 2), dtype=torch.float32, quantization=Quantization.NF4)
    assert body.span == Span(0, 2)
    assert not [file for file in cache.glob("quantized/*/*") if file.is_file()]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"load_in_8bit": True}, id="int8"),
        pytest.param({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}, id="skips"),
        pytest.param({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, id="fp4"),
        pytest.param(
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, id="double"
        ),
    ],
)
def test_a_quantized_checkpoint_is_used_without_change(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    model.save_pretrained(tmp_path / "saved")
    hidden = torch.randn(1, 1, 128)
    expected = blocks_of(model, hidden)
    checkpoint = Checkpoint.open(tmp_path / "saved")
    body = load_body(checkpoint, Span(0, 4), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(body(hidden), expected, rtol=1e-4, atol=1e-4)
    quantized = {name for name, module in body.named_modules() if isinstance(module, FrozenLinear)}
    skipped = {name for name in quantized if ".layers.1.mlp" in name}
    assert (len(quantized), bool(skipped)) == ((25, False) if "llm_int8_skip_modules" in options else (28, True))
    with pytest.raises(UserError, match="quantized already"):
        load_body(checkpoint, Span(0, 4), dtype=torch.float32, quantization=Quantization.NF4)


def test_mxfp4_gives_the_results_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config("gpt_oss", hidden_size=64, intermediate_size=64)
    model = GptOssForCausalLM(config).bfloat16()
    experts = re.compile(r"\.(gate_up_proj|down_proj)$")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not experts.search(name)}
    for name, tensor in model.state_dict().items():
        if experts.search(name):
            num_experts, num_in, num_out = tensor.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (num_experts, num_out, num_in // 32, 16)).byte()
            tensors[f"{name}_scales"] = torch.randint(118, 122, (num_experts, num_out, num_in // 32)).byte()
    model.save_pretrained(tmp_path, state_dict=tensors)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    hidden = torch.randn(1, 5, 64).bfloat16()
    expected = blocks_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(), hidden)
    with torch.no_grad():
        checkpoint = Checkpoint.open(tmp_path)
        body = load_body(checkpoint, Span(0, 5), dtype=torch.bfloat16)
        torch.testing.assert_close(body(hidden), expected, rtol=0.02, atol=0.02)
    # On a CPU the codes become ordinary weights, so those have to fit.
    held = tuple(sum(weight.nbytes for weight in body.block(block).parameters()) for block in range(5))
    assert dequantized_bytes(checkpoint.family, checkpoint.config, torch.bfloat16) == held


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "gptq.*pip install"),
        ({"quant_method": "awq", "bits": 4}, "awq.*pip install"),
        ({"quant_method": "of another age"}, "of another age"),
    ],
)
def test_a_quantization_that_this_machine_cannot_use_is_refused_in_one_line(
    folder: Path, tmp_path: Path, described: dict[str, Any], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": described}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        load_body(Checkpoint.open(tmp_path / "copy"), Span(0, 4), dtype=torch.bfloat16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "more_blocks"), [("int8", 3), ("nf4", 6)])
def test_more_quantized_blocks_fit(
    folder: Path, kind: str, more_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=12)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    checkpoint = Checkpoint.open(tmp_path / "deep")
    monkeypatch.setattr("shoal.server.capacity.free_memory", lambda device: int(1.3 * checkpoint.block_bytes[0]))

    def num_blocks(quantization: str) -> int:
        options = ServerConfig(model="", quantization=quantization)
        return max_num_blocks(options, checkpoint, torch.float32, torch.device("cpu"))

    assert num_blocks("none") == 1
    assert num_blocks(kind) >= more_blocks


def test_a_quantization_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no quantization 'int3'"), swarm_of(folder, "0:4", quantization="int3"):
        pass


def test_every_certified_family_can_be_quantized(tmp_path: Path) -> None:
    """Each in one of both kinds: which weights are quantized is the same for both."""
    kinds = itertools.cycle([(Quantization.INT8, 0.3), (Quantization.NF4, 0.1)])
    for model_type, (kind, rounding) in zip(sorted(CERTIFIED), kinds, strict=False):
        config = tiny_config(model_type)
        tiny_model(config).save_pretrained(tmp_path / model_type)
        checkpoint = Checkpoint.open(tmp_path / model_type)
        span, quantized = Span(0, checkpoint.num_blocks), quantizable_weights(checkpoint.family, checkpoint.config)
        hidden = torch.randn(1, 3, checkpoint.config.hidden_size)
        body = load_body(checkpoint, span, dtype=torch.float32, quantization=kind)
        assert sum(isinstance(module, FrozenLinear) for module in body.modules()) == len(quantized), model_type
        with torch.no_grad():
            actual, expected = body(hidden), dequantized(body)(hidden)
        assert (actual - expected).norm() < rounding * expected.norm(), (model_type, kind)
