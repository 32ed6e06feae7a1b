"""The client's own output head: packed or quantized, it is the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shoal import AutoDistributedModel, UserError
from shoal.model.linear.packed_linear import FrozenLinear

from .harness import QUICK, Swarm, swarm_of

MakeSwarm = Callable[..., Swarm]
PROMPT = torch.tensor([[5, 17, 42, 9, 33]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def wide(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model whose head is worth packing: 64 by 2048."""
    folder: Path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
        tie_word_embeddings=request.param == "tied",
        initializer_range=0.2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_in_bfloat16_the_tokens_are_those_of_the_whole_model(wide: Path):
    whole = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).eval()
    with swarm_of(wide, "0:1", "1:2", dtype="bfloat16") as made:
        model = made.model(dtype="bfloat16")
        answer = model.generate(PROMPT, max_new_tokens=12)
        model(PROMPT, labels=PROMPT).loss.backward()
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=12).tolist()
    assert model.get_output_embeddings().weight.grad is not None
    assert model.state_dict().keys() >= {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.02), ("nf4", 0.15)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_quantized_head_is_nearly_the_same_and_the_embeddings_stay(
    wide: Path, quantization: str, error: float, dtype: str
):
    whole = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    with swarm_of(wide, "0:2") as made:
        model = made.model(dtype=dtype, head_quantization=quantization)
        logits = model(PROMPT).logits.float()
        model.generate(PROMPT, max_new_tokens=3)
    expected = whole(PROMPT).logits
    assert isinstance(model.get_output_embeddings(), FrozenLinear)
    assert (logits - expected).norm() < error * expected.norm()
    assert torch.equal(model.get_input_embeddings().weight.float(), whole.get_input_embeddings().weight)


def test_what_cannot_be_quantized_is_refused(swarm: MakeSwarm):
    made = swarm("0:4")
    with pytest.raises(UserError, match="there is no quantization 'int3'"):
        made.model(head_quantization="int3")
    with pytest.raises(UserError, match="no output head to quantize"):
        made.model(AutoDistributedModel, head_quantization="nf4")
    with pytest.raises(UserError, match="a remote output head cannot be quantized by the client"):
        made.model(head_quantization="nf4", config=replace(QUICK, remote_head=True))
