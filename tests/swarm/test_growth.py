"""Sessions that get longer than was expected of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from shoal import MissingBlocks, UserError

from .harness import QUICK, Swarm

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
MORE = torch.tensor([[8, 61]])
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def begin(model: Any, **options: Any) -> Any:
    return model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampling"])
def test_generate_goes_on_with_a_cache_that_it_returned(
    swarm: MakeSwarm, whole: PreTrainedModel, options: dict[str, Any]
):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model()
    results = []
    for each in (whole, model):
        torch.manual_seed(1)
        said = begin(each)
        for _ in range(3):
            text = torch.cat((said.sequences, MORE), dim=1)
            said = each.generate(
                text,
                past_key_values=said.past_key_values,
                max_new_tokens=20,
                return_dict_in_generate=True,
                **options,
            )
        results.append(said.sequences.tolist())
    assert results[1] == results[0]


def test_assisted_decoding_goes_on_with_a_cache_that_it_returned(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    said, options = begin(model), {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True}
    for _ in range(3):
        text = torch.cat((said.sequences, MORE), dim=1)
        said = model.generate(text, past_key_values=said.past_key_values, max_new_tokens=20, **options)
        # Without a cache, because with one Transformers' assisted decoding loses its place in the text.
        assert said.sequences.tolist() == whole.generate(text, max_new_tokens=20).tolist()


def test_generate_goes_on_with_a_cache_that_was_cropped(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    results = []
    for each in (whole, model):
        said = begin(each)
        said.past_key_values.crop(-3)
        text = torch.cat((said.sequences[:, :6], MORE), dim=1)
        results.append(each.generate(text, past_key_values=said.past_key_values, max_new_tokens=40).tolist())
    assert results[1] == results[0]


@torch.no_grad()
def test_generate_goes_on_with_a_cache_that_a_call_returned(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    text = torch.cat((PROMPT, MORE), dim=1)
    for options in ({"use_cache": True}, {}):
        cache = model(PROMPT, **options).past_key_values
        found = model.generate(text, past_key_values=cache, max_new_tokens=40)
        assert found.tolist() == whole.generate(text, max_new_tokens=40).tolist()


@torch.no_grad()
def test_a_session_that_grows_survives_servers_that_die(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4", "0:4")
    model = swarm_.model()
    said = begin(model)
    swarm_.kill(said.past_key_values.session.servers[0])
    found = model.generate(said.sequences, past_key_values=said.past_key_values, max_new_tokens=40)
    assert found.tolist() == whole.generate(PROMPT, max_new_tokens=44).tolist()


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks that often says the same as the one of four."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 2
    config.layer_types = None
    model = LlamaForCausalLM(config)
    model.load_state_dict(whole.state_dict(), strict=False)
    path = tmp_path_factory.mktemp("small")
    model.save_pretrained(path)
    return path


def test_an_assistant_may_be_in_a_swarm_too(swarm: MakeSwarm, whole: PreTrainedModel, small: Path):
    swarm_ = swarm("0:2", "2:4")
    swarm_.start("0:2", folder=small)
    model, assistant = swarm_.model(), swarm_.model(folder=small)
    before = [server.engine.cache_tokens_left for server in swarm_.servers.values()]
    expected = whole.generate(PROMPT, max_new_tokens=60).tolist()
    assert model.generate(PROMPT, assistant_model=assistant, max_new_tokens=60).tolist() == expected
    with model.inference_session(max_length=100), assistant.inference_session(max_length=100) as other:
        assert model.generate(PROMPT, assistant_model=assistant, max_new_tokens=60).tolist() == expected
        assert other.position == 0
    swarm_.settle(lambda: [each.engine.cache_tokens_left for each in swarm_.servers.values()] == before)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("padded", [False, True], ids=["one", "left-padded"])
def test_prompts_of_peft_are_generated_from(
    swarm: MakeSwarm, whole: PreTrainedModel, config: Any, options: dict[str, Any], padded: bool
):
    model = swarm("0:2", "2:4").model()
    inputs = {"input_ids": PADDED, "attention_mask": MASK} if padded else {"input_ids": PROMPT}
    results = []
    for each in (copy.deepcopy(whole), model):
        torch.manual_seed(3)
        tuned = get_peft_model(each, config(task_type="CAUSAL_LM", num_virtual_tokens=7)).eval()
        results.append(tuned.generate(**inputs, max_new_tokens=12, **options).tolist())
    assert results[1] == results[0]


def test_a_limit_that_the_user_set_stays(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    with model.inference_session(max_length=8) as session:
        with pytest.raises(UserError, match="5 tokens and 20 new ones in a session of at most 8"):
            model.generate(PROMPT, max_new_tokens=20)
        assert session.max_length == 8
        assert model.generate(PROMPT, max_new_tokens=3).tolist() == whole.generate(PROMPT, max_new_tokens=3).tolist()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"tuning_mode": "ptune", "pre_seq_len": 4}], ids=["", "soft prompt"])
def test_sessions_grow_up_to_what_the_model_allows(swarm: MakeSwarm, options: dict[str, Any]):
    model = swarm("0:4").model(**options)
    longest = 512 - options.get("pre_seq_len", 0)
    ids = torch.randint(2, 97, (1, longest), generator=torch.Generator().manual_seed(0))
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    model(ids[:, -1:], past_key_values=cache)
    with pytest.raises(UserError, match=f"{longest + 1} tokens in a session of at most {longest}"):
        model(ids[:, -1:], past_key_values=cache)
    with model.inference_session() as session:
        assert session.max_length == longest
        model(ids)


@torch.no_grad()
def test_a_session_that_outgrows_its_server_moves_to_one_with_more_room(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", cache_tokens=64)
    model = swarm_.model(config=replace(QUICK, patience_seconds=0.2))
    ids = torch.randint(2, 97, (1, 90), generator=torch.Generator().manual_seed(0))
    cache = model(ids[:, :60], use_cache=True).past_key_values
    assert cache.session.servers == ("s0",)
    with pytest.raises(MissingBlocks, match="90 tokens can never fit into this server's cache"):
        model(ids[:, 60:], past_key_values=cache)
    swarm_.start("0:4")
    logits = model(ids[:, 60:], past_key_values=cache).logits
    assert cache.session.servers == ("s1",)
    torch.testing.assert_close(logits, whole(ids).logits[:, 60:], rtol=1e-3, atol=1e-4)


def test_a_route_is_for_the_length_that_is_expected(swarm: MakeSwarm):
    swarm_ = swarm()
    swarm_.start("0:4", cache_tokens=64)
    swarm_.start("0:4", cache_tokens=512)
    model = swarm_.model()
    for num_tokens in (100, 200):
        result = model.generate(PROMPT, max_new_tokens=num_tokens, return_dict_in_generate=True)
        assert result.past_key_values.session.servers == ("s1",)
