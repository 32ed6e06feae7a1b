"""What the parity suite does not cover: errors, other tasks, other ways to generate, several threads."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

from shoal.errors import CheckpointError, UnsupportedOperation
from shoal.model.body import Body, build_body, joined_body
from shoal.model.families import family_of
from shoal.model.head import build_head
from shoal.model.remote_cache import RemoteCache
from shoal.spans import Span

from .local_blocks import LocalBlocks
from .parity import PROMPT, Pair, assert_equal
from .tiny_models import tiny_config, tiny_model


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("llama")


@pytest.fixture
def tensors(pair: Pair) -> dict[str, Tensor]:
    return dict(pair.whole.state_dict())


def build(pair: Pair, span: Span, tensors: dict[str, Tensor]) -> Body:
    return build_body(pair.family, pair.config, span, tensors, dtype=torch.float32)


def test_a_missing_tensor_is_named_instead_of_initialized(pair: Pair, tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks layers\.3\.mlp\.up_proj\.weight"):
        build(pair, Span(2, 4), tensors)
    build(pair, Span(0, 2), tensors)


def test_a_tensor_of_another_shape_is_named(pair: Pair, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(5)
    with pytest.raises(CheckpointError, match=r"layers\.3\.input_layernorm\.weight is \[5\]"):
        build(pair, Span(2, 4), tensors)


def test_an_unknown_tensor_is_not_ignored(pair: Pair, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.scale"] = torch.ones(5)
    with pytest.raises(CheckpointError, match=r"no place for layers\.3\.mlp\.up_proj\.scale"):
        build(pair, Span(2, 4), tensors)


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification])
def test_a_head_that_lacks_a_tensor_is_refused(
    pair: Pair, tensors: dict[str, Tensor], model_class: type[PreTrainedModel]
) -> None:
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks (model\.)?norm\.weight"):
        build_head(model_class, pair.family, pair.config, tensors, blocks=pair.blocks, dtype=torch.float32)


def test_a_body_holds_its_blocks_and_nothing_else() -> None:
    config = tiny_config("llama", num_hidden_layers=16)
    whole = tiny_model(config)
    body = build_body(family_of(config), config, Span(3, 5), whole.state_dict(), dtype=torch.float32)
    held = {name.removeprefix("backbone.layers.").split(".")[0] for name, _ in body.named_parameters()}
    assert held == {"3", "4"}
    assert sum(p.numel() for p in body.parameters()) == sum(
        p.numel() for block in (3, 4) for p in whole.model.layers[block].parameters()
    )


def test_a_joined_body_computes_what_one_body_does_and_frees_the_blocks_that_it_leaves_out(
    pair: Pair, tensors: dict[str, Tensor]
) -> None:
    hidden = torch.randn(1, 6, 32)
    parts = [build(pair, Span(0, 3), tensors), build(pair, Span(3, 4), tensors)]
    joined = joined_body(parts, Span(2, 4))
    with torch.no_grad():
        assert torch.equal(joined(hidden), build(pair, Span(2, 4), tensors)(hidden))
        assert torch.equal(parts[0](hidden), build(pair, Span(0, 3), tensors)(hidden)), (
            "the first one can still be used"
        )
    left_out, kept = (weakref.ref(parts[0].block(block)) for block in (1, 2))
    assert kept() is joined.block(2)
    parts.clear()
    gc.collect()
    assert (left_out() is None, kept() is None) == (True, False)


def test_blocks_that_nobody_holds_cannot_be_joined(pair: Pair, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="block 2 is not there"):
        joined_body([build(pair, Span(0, 2), tensors)], Span(0, 3))


def test_a_client_holds_no_block_but_knows_their_number(pair: Pair) -> None:
    assert not any(".layers." in name for name, _ in pair.cut.named_parameters())
    assert pair.cut.config.num_hidden_layers == 5
    assert type(pair.cut).__name__ == "LlamaForCausalLM"


def test_the_base_model_gives_the_same_hidden_states(pair: Pair, tensors: dict[str, Tensor]) -> None:
    cut = build_head(LlamaModel, pair.family, pair.config, tensors, blocks=pair.blocks, dtype=torch.float32)
    with torch.no_grad():
        assert_equal(cut(PROMPT).last_hidden_state, pair.whole.model(PROMPT).last_hidden_state)


def test_a_new_classifier_may_be_missing_from_the_checkpoint(pair: Pair, tensors: dict[str, Tensor]) -> None:
    cut = build_head(
        LlamaForSequenceClassification, pair.family, pair.config, tensors, blocks=pair.blocks, dtype=torch.float32
    )
    logits = cut(PROMPT).logits
    assert logits.shape == (2, 2)
    logits.sum().backward()
    assert cut.score.weight.grad is not None


def test_tied_embeddings_are_stored_once_and_stay_tied() -> None:
    pair = Pair("llama", tie_word_embeddings=True)
    assert pair.cut.lm_head.weight is pair.cut.model.embed_tokens.weight
    with torch.no_grad():
        assert_equal(pair.cut(PROMPT).logits, pair.whole(PROMPT).logits)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": True, "temperature": 0.8, "top_p": 0.9}, id="sampling"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several samples"),
        pytest.param({"num_beams": 3, "do_sample": True}, id="sampled beams"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt lookup"),
        pytest.param({"use_cache": False}, id="no cache"),
    ],
)
def test_every_way_to_generate_gives_the_same_tokens(pair: Pair, options: dict[str, Any]) -> None:
    def generate(model: PreTrainedModel) -> Tensor:
        torch.manual_seed(1)
        return model.generate(PROMPT[:1], max_new_tokens=8, pad_token_id=0, **options)

    assert torch.equal(generate(pair.cut), generate(pair.whole))


def test_assisted_generation_gives_the_same_tokens(pair: Pair) -> None:
    assistant = tiny_model(tiny_config("llama", num_hidden_layers=2))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = pair.whole.generate(PROMPT[:1], **options)
    assert torch.equal(pair.cut.generate(PROMPT[:1], assistant_model=assistant, **options), expected)


def test_a_cache_without_a_session_is_refused(pair: Pair) -> None:
    with pytest.raises(UnsupportedOperation, match="DynamicCache"):
        pair.cut(PROMPT, past_key_values=DynamicCache(config=pair.config))


def test_a_call_returns_a_cache_unless_use_cache_is_false(pair: Pair) -> None:
    assert isinstance(pair.cut(PROMPT).past_key_values, RemoteCache)
    assert isinstance(pair.cut(PROMPT, use_cache=True).past_key_values, RemoteCache)
    assert pair.cut(PROMPT, use_cache=False).past_key_values is None


def test_recurrent_state_refuses_to_rewind_and_does_not_change() -> None:
    pair = Pair("qwen3_next")
    cache = pair.new_cache()
    with torch.no_grad():
        pair.cut(PROMPT[:, :6], past_key_values=cache)
        with pytest.raises(UnsupportedOperation, match="recurrent state of block 0"):
            cache.crop(-1)
        assert cache.get_seq_length() == 6
        logits = pair.cut(PROMPT[:, 6:], past_key_values=cache).logits
        assert_equal(logits, pair.whole(PROMPT).logits[:, 6:])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mamba"])
def test_rows_may_be_dropped_and_repeated(model_type: str) -> None:
    pair = Pair(model_type)
    cache = pair.new_cache()
    name = "cache_params" if model_type == "mamba" else "past_key_values"
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad():
        pair.cut(PROMPT[:, :5], **{name: cache})
        cache.batch_select_indices(rows)
        logits = pair.cut(PROMPT[rows, 5:6], **{name: cache}).logits
        assert_equal(logits, pair.whole(PROMPT).logits[rows, 5:6])


@pytest.mark.parametrize("model_type", ["llama", "mamba", "jamba", "qwen3_next"])
def test_a_padded_prompt_may_come_in_several_calls(model_type: str) -> None:
    pair = Pair(model_type)
    mask = torch.ones_like(PROMPT)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = torch.randn(2, 7, 32)

    def run(sizes: list[int]) -> Tensor:
        session = pair.blocks.new_session(batch_size=2, max_length=16)
        parts, end = [], 0
        for size in sizes:
            start, end = end, end + size
            parts.append(
                pair.blocks(
                    hidden[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=RemoteCache(session),
                )
            )
        return torch.cat(parts, dim=1)

    real = mask.bool()
    assert_equal(run([3, 1, 3])[real], run([7])[real])


def test_a_mask_of_another_length_is_refused(pair: Pair) -> None:
    (body, _) = pair.blocks.hops[0]
    with pytest.raises(ValueError, match="a mask of 3 tokens, where there are 4"):
        body(torch.randn(1, 4, 32), attention_mask=torch.ones(1, 3))


def test_outputs_inside_the_blocks_are_refused(pair: Pair) -> None:
    with pytest.raises(UnsupportedOperation):
        pair.cut(PROMPT, output_hidden_states=True)


def test_several_threads_may_use_one_model(pair: Pair) -> None:
    prompts = [(PROMPT + shift) % 90 + 3 for shift in range(8)]
    with torch.no_grad():
        expected = [pair.whole(prompt).logits for prompt in prompts]

    @torch.no_grad()
    def use(prompt: Tensor) -> Tensor:
        cache = RemoteCache(pair.blocks.new_session(batch_size=2, max_length=16))
        parts = [pair.cut(prompt[:, i : i + 1], past_key_values=cache).logits for i in range(prompt.shape[1])]
        return torch.cat(parts, dim=1)

    with ThreadPoolExecutor(4) as pool:
        for logits, whole in zip(pool.map(use, prompts), expected, strict=True):
            assert_equal(logits, whole)


def test_hops_may_change_from_call_to_call(pair: Pair) -> None:
    (body, _) = pair.blocks.hops[1]
    one_hop_more = [*pair.blocks.hops[:1], (body, Span(1, 2)), (body, Span(2, 3)), *pair.blocks.hops[2:]]
    pair.cut.attach_blocks(LocalBlocks(one_hop_more))
    with torch.no_grad():
        assert_equal(pair.cut(PROMPT).logits, pair.whole(PROMPT).logits)
    pair.cut.attach_blocks(pair.blocks)


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_peft_are_trained_as_on_one_machine(method: str) -> None:
    import peft

    pair = Pair("llama")

    def train(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        loss = tuned(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), labels=PROMPT).loss
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in tuned.parameters() if parameter.grad is not None]

    (loss, gradients), (expected_loss, expected_gradients) = train(pair.cut), train(pair.whole)
    assert_equal(loss, expected_loss)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_equal(gradient, expected)
