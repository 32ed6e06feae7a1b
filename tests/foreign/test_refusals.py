"""What Transformers gives on one machine and a swarm cannot give is refused, with a hint: never left out silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from shoal import AutoDistributedModel, AutoDistributedModelForSequenceClassification, UserError

from .pair import TEXTS, Pair

INSIDE: Mapping[str, Mapping[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "both": {"output_hidden_states": True, "output_attentions": True},
}


@pytest.mark.parametrize("what", INSIDE)
def test_what_is_inside_the_blocks_is_refused_in_a_call(pair: Pair, what: str):
    with pytest.raises(UserError, match="inside the blocks stays on the servers") as caught:
        pair.model(TEXTS, **INSIDE[what])
    assert caught.value.hint


def test_the_first_hidden_states_are_refused_by_their_number_too(pair: Pair):
    with pytest.raises(UserError, match="inside the blocks stays on the servers"):
        pair.model(TEXTS, output_hidden_states=0)


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_inside_the_blocks_is_refused_in_a_generation(pair: Pair, what: str, beams: int):
    with pytest.raises(UserError, match="inside the blocks stays on the servers") as caught:
        pair.model.generate(TEXTS, max_new_tokens=2, num_beams=beams, return_dict_in_generate=True, **INSIDE[what])
    assert caught.value.hint


@pytest.mark.parametrize("kind", [AutoDistributedModel, AutoDistributedModelForSequenceClassification])
@pytest.mark.parametrize("what", INSIDE)
def test_models_of_other_tasks_refuse_it_as_well(pair: Pair, kind: type[Any], what: str):
    model = pair.swarm.model(kind)
    with pytest.raises(UserError, match="inside the blocks stays on the servers"):
        model(TEXTS[:1], **INSIDE[what])


def test_a_config_that_wants_hidden_states_is_refused_in_the_first_call(pair: Pair):
    model = pair.swarm.model(output_hidden_states=True)
    with pytest.raises(UserError, match="inside the blocks stays on the servers"):
        model(TEXTS[:1])
    assert model(TEXTS[:1], output_hidden_states=False).hidden_states is None


def test_a_quantized_cache_is_the_servers_choice(pair: Pair):
    with pytest.raises(UserError, match="the cache is on the servers") as caught:
        pair.model.generate(TEXTS, max_new_tokens=2, cache_implementation="quantized")
    assert "--cache-dtype int8" in (caught.value.hint or "")


def test_a_cache_of_transformers_cannot_hold_what_servers_have(pair: Pair):
    with torch.no_grad():
        cache = pair.whole(TEXTS, use_cache=True).past_key_values
    with pytest.raises(UserError, match="cannot hold their state"):
        pair.model(TEXTS[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "group", [{"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 1.0}, {"penalty_alpha": 0.6}]
)
def test_what_transformers_itself_has_given_up_is_an_error_here_too(pair: Pair, group: Mapping[str, Any]):
    errors = []
    for model in (pair.whole, pair.model):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whichever Transformers raises
            model.generate(TEXTS, max_new_tokens=2, **{"top_k": 4, **group})
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
