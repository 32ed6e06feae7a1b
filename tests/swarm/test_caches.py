"""Caches that calls of the model return, as in Transformers: each has a session behind it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal import AutoDistributedModel, UnsupportedOperation, UserError

from .harness import QUICK, Swarm, swarm_of
from .tiny_models import tiny_config, with_noise

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
NEGATIVE = torch.tensor([[8, 61, 70]])
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

BATCHES = {"one": (PROMPT, torch.ones_like(PROMPT)), "left-padded": (PADDED, MASK)}


def free_tokens(swarm: Swarm) -> list[int]:
    return [server.engine.cache_tokens_left for server in swarm.servers.values()]


def decoded(model: Any, ids: torch.Tensor, mask: torch.Tensor, num_tokens: int, **options: Any) -> list[list[int]]:
    """A loop as people write it."""
    tokens, cache, said = ids, None, []
    for _ in range(num_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, **options)
        cache = output.past_key_values
        tokens = output.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
        said.append(tokens)
    return torch.cat(said, dim=1).tolist()


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("options", [{"use_cache": True}, {}], ids=["asked for", "by default"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_loop_written_by_hand_gives_the_tokens_of_the_whole_model(
    swarm: MakeSwarm, whole: PreTrainedModel, batch: str, options: dict[str, bool], grad: bool
):
    swarm_ = swarm("0:2", "2:4")
    model, before = swarm_.model(), free_tokens(swarm_)
    with torch.set_grad_enabled(grad):
        assert decoded(model, *BATCHES[batch], 12, **options) == decoded(whole, *BATCHES[batch], 12, **options)
    swarm_.settle(lambda: free_tokens(swarm_) == before)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mamba", "falcon_h1", "gemma3_text", "xglm"])
@torch.no_grad()
def test_every_family_returns_its_cache_under_its_own_name(family: str, tmp_path: Path):
    torch.manual_seed(0)
    whole = with_noise(AutoModelForCausalLM.from_config(tiny_config(family)).eval())
    whole.save_pretrained(tmp_path)
    name = "cache_params" if family == "mamba" else "past_key_values"
    with swarm_of(tmp_path, "0:2", "2:5") as swarm_:
        model = swarm_.model()
        ids = torch.arange(3, 12)[None]
        for options in ({"use_cache": True}, {}):
            first = model(ids[:, :7], **options)
            then = [model(ids[:, n : n + 1], **{name: first[name], **options}).logits for n in (7, 8)]
            logits = torch.cat((first.logits, *then), dim=1)
            torch.testing.assert_close(logits, whole(ids).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_model_without_a_head_returns_its_cache_too_also_in_a_tuple(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model(AutoDistributedModel)
    expected = whole.model(PROMPT).last_hidden_state
    for options in ({"use_cache": True}, {}):
        hidden, cache = model(PROMPT[:, :3], return_dict=False, **options)
        more = model(PROMPT[:, 3:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(torch.cat((hidden, more), dim=1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_branches_of_one_text_have_caches_of_their_own(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    texts = [PROMPT, PROMPT + 1, NEGATIVE]
    caches = [model(text, use_cache=True).past_key_values for text in texts]
    for text, cache in zip(texts, caches, strict=True):
        logits = model(NEGATIVE, past_key_values=cache).logits
        expected = whole(torch.cat((text, NEGATIVE), dim=1)).logits[:, text.shape[1] :]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"use_cache": True}, {}], ids=["asked for", "by default"])
def test_a_returned_cache_is_cropped_and_rearranged_like_that_of_the_whole_model(
    swarm: MakeSwarm, whole: PreTrainedModel, options: dict[str, bool]
):
    model = swarm("0:2", "2:4").model()
    results = []
    for each in (whole, model):
        cache = each(PADDED, attention_mask=MASK, **options).past_key_values
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.get_seq_length() == 3
        mask = torch.cat((MASK[[1, 0], :3], torch.ones(2, 3, dtype=torch.int64)), dim=1)
        results.append(each(NEGATIVE.expand(2, -1), attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("servers", [("0:4",), ("0:2", "2:4")])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "negative_prompt_ids": NEGATIVE},
        {
            "guidance_scale": 2.0,
            "negative_prompt_ids": NEGATIVE,
            "negative_prompt_attention_mask": torch.tensor([[0, 1, 1]]),
        },
        {"guidance_scale": 1.5, "negative_prompt_ids": NEGATIVE, "use_cache": False},
    ],
    ids=["guidance", "negative prompt", "padded negative prompt", "no cache"],
)
def test_guidance_gives_the_tokens_of_the_whole_model(
    swarm: MakeSwarm, whole: PreTrainedModel, options: dict[str, Any], servers: tuple[str, ...]
):
    swarm_ = swarm(*servers)
    model, before = swarm_.model(), free_tokens(swarm_)
    expected = whole.generate(PROMPT, max_new_tokens=12, **options).tolist()
    assert model.generate(PROMPT, max_new_tokens=12, **options).tolist() == expected
    swarm_.settle(lambda: free_tokens(swarm_) == before)
    if "use_cache" not in options:
        with model.inference_session(max_length=40) as session:
            assert model.generate(PROMPT, max_new_tokens=12, session=session, **options).tolist() == expected


def test_guidance_of_several_texts_gives_the_tokens_of_the_whole_model(swarm: MakeSwarm, whole: PreTrainedModel):
    options = {"attention_mask": MASK, "guidance_scale": 1.5, "max_new_tokens": 8}
    model = swarm("0:2", "2:4").model()
    assert model.generate(PADDED, **options).tolist() == whole.generate(PADDED, **options).tolist()


def test_a_cache_that_is_let_go_gives_its_room_back(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    model, before = swarm_.model(), free_tokens(swarm_)
    output = model(PROMPT, use_cache=True)
    assert free_tokens(swarm_) != before
    del output
    gc.collect()
    swarm_.settle(lambda: free_tokens(swarm_) == before)


def test_a_call_that_does_not_ask_for_a_cache_opens_no_session(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    model, before = swarm_.model(), free_tokens(swarm_)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output = model(PROMPT)
        assert output.past_key_values.get_seq_length() == 5
        assert model(PROMPT, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(PROMPT).past_key_values is None
        model.config.use_cache = True
    assert free_tokens(swarm_) == before


def test_a_call_that_does_not_ask_for_a_cache_has_gradients_and_one_yet(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    results = []
    for each in (whole, model):
        embeds = each.get_input_embeddings()(PROMPT).detach().requires_grad_()
        output = each(inputs_embeds=embeds, labels=PROMPT)
        output.loss.backward()
        with torch.no_grad():
            results.append((embeds.grad, each(NEGATIVE, past_key_values=output.past_key_values).logits))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_family_that_resolves_the_default_itself_has_gradients_too(tmp_path: Path):
    torch.manual_seed(0)
    whole = with_noise(AutoModelForCausalLM.from_config(tiny_config("xglm")).eval())
    whole.save_pretrained(tmp_path)
    with swarm_of(tmp_path, "0:2", "2:5") as swarm_:
        gradients = []
        for each in (whole, swarm_.model()):
            embeds = whole.get_input_embeddings()(PROMPT).detach().requires_grad_()
            each(inputs_embeds=embeds, labels=PROMPT).loss.backward()
            gradients.append(embeds.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_a_cache_that_was_not_asked_for_survives_servers_that_die(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", "0:4", "0:4")
    model = swarm_.model()
    with torch.no_grad():
        cache = model(PROMPT).past_key_values
        for name in ("s0", "s1"):
            swarm_.kill(name)
        logits = model(NEGATIVE, past_key_values=cache).logits
        expected = whole(torch.cat((PROMPT, NEGATIVE), dim=1)).logits[:, 5:]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("trained", ["embeddings", "factors", "head and factors"])
def test_gradients_do_not_pretend_to_flow_through_a_cache(swarm: MakeSwarm, trained: str):
    model = swarm("0:4").model()
    if trained != "embeddings":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.lm_head.weight.requires_grad_(trained == "head and factors")
    output = model(input_ids=PROMPT, labels=PROMPT, use_cache=True)
    with pytest.raises(UnsupportedOperation, match="do not flow through an inference session") as error:
        output.loss.backward()
    assert error.value.hint == "call the model with use_cache=False"


def test_a_cache_of_a_model_with_a_soft_prompt_goes_on_from_the_prompt(swarm: MakeSwarm):
    model = swarm("0:2", "2:4").model(tuning_mode="deep_ptune", pre_seq_len=3)
    torch.nn.init.normal_(model.blocks.get_submodule("1").soft_prompt, std=0.5)
    with torch.no_grad():
        expected = model(torch.cat((PROMPT, NEGATIVE), dim=1), use_cache=False).logits[:, 5:]
        for options in ({"use_cache": True}, {}):
            cache = model(PROMPT, **options).past_key_values
            assert cache.get_seq_length() == 5
            logits = model(NEGATIVE, past_key_values=cache).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_cache_that_is_asked_for_needs_no_server_that_trains(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4", training=False).model()
    ones = torch.ones_like(PROMPT)
    assert decoded(model, PROMPT, ones, 6, use_cache=True) == decoded(whole, PROMPT, ones, 6)


@torch.no_grad()
def test_a_thin_client_asks_for_logits_where_it_asks_for_a_cache(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2")
    swarm_.start("2:4", serve_head=True)
    model = swarm_.model(config=replace(QUICK, remote_head=True))
    model.lm_head.forward = None  # is not to be used
    ones = torch.ones_like(PROMPT)
    assert decoded(model, PROMPT, ones, 6, use_cache=True) == decoded(whole, PROMPT, ones, 6, use_cache=True)


def test_guidance_is_not_computed_from_the_likeliest_tokens_only(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm()
    swarm_.start("0:4", serve_head=True)
    options = {"max_new_tokens": 8, "guidance_scale": 1.5}
    model = swarm_.model(config=replace(QUICK, remote_head=True))
    assert model.generate(PROMPT, **options).tolist() == whole.generate(PROMPT, **options).tolist()
    likeliest = swarm_.model(config=replace(QUICK, remote_head=True, head_top_k=5))
    with pytest.raises(UserError, match="guidance compares the logits of all tokens"):
        likeliest.generate(PROMPT, **options)


@torch.no_grad()
def test_a_step_of_no_tokens_changes_nothing(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    blocks, before = swarm_.model().transformer.h, free_tokens(swarm_)
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with blocks.inference_session(max_length=10, batch_size=2) as session:
        assert session.step(hidden[:, :0]).shape == (2, 0, 32)
        assert free_tokens(swarm_) == before
        first = session.step(hidden[:, :4])
        assert session.step(hidden[:, :0]).shape == (2, 0, 32)
        found = torch.cat((first, session.step(hidden[:, 4:])), dim=1)
        with pytest.raises(UserError, match="inputs of shape"):
            session.step(hidden[:0])
    torch.testing.assert_close(found, blocks(hidden), rtol=1e-4, atol=1e-5)
