"""What Transformers' tests of generation ask of one machine: every strategy, its tokens, scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from .pair import NEVER, TEXTS, Pair, assert_close, assert_same_generation

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "greedy, without a cache": {"use_cache": False},
    "greedy, with penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]]},
    "greedy, between lengths": {"min_new_tokens": 4, "eos_token_id": [5, 40, 41, 42], "pad_token_id": 0},
    "greedy, with a forced end": {
        "forced_eos_token_id": 2,
        "suppress_tokens": [3, 4, 40],
        "begin_suppress_tokens": [6],
    },
    "sampling": {"do_sample": True, "temperature": 0.8},
    "sampling, top k and p": {"do_sample": True, "top_k": 20, "top_p": 0.8},
    "sampling, min p": {"do_sample": True, "min_p": 0.02, "top_k": 0},
    "sampling, typical": {"do_sample": True, "typical_p": 0.7, "top_k": 0},
    "sampling, epsilon and eta": {"do_sample": True, "epsilon_cutoff": 0.005, "eta_cutoff": 0.005, "top_k": 0},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
    "beams, ending early": {"num_beams": 3, "eos_token_id": [5, 40, 41, 42], "early_stopping": "never"},
    "beams, sampled": {"num_beams": 3, "do_sample": True, "top_k": 20, "num_return_sequences": 2},
}


UNPADDED = ("greedy", "sampling", "beams")
CASES = [
    *((strategy, "padding on the left") for strategy in STRATEGIES),
    *((strategy, "no padding") for strategy in UNPADDED),
]


@pytest.mark.parametrize(("strategy", "mask"), CASES)
def test_a_strategy_gives_the_tokens_scores_and_logits_of_transformers(pair: Pair, strategy: str, mask: str):
    options = {"output_scores": True, "output_logits": True, **STRATEGIES[strategy]}
    actual, expected = pair.generate(**pair.inputs(mask), **options)
    assert type(actual).__name__ == type(expected).__name__
    assert_same_generation(actual, expected)


@pytest.mark.parametrize(
    ("guesses", "sampled"),
    [("prompt lookup", False), ("prompt lookup", True), ("assistant", False), ("assistant", True)],
)
def test_guessed_tokens_change_nothing(pair: Pair, guesses: str, sampled: bool):
    text = TEXTS[:1, :5].repeat(1, 3)
    how = {"prompt_lookup_num_tokens": 4} if guesses == "prompt lookup" else {"assistant_model": pair.whole}
    actual, expected = pair.generate(input_ids=text, do_sample=sampled, output_scores=True, **how)
    assert_same_generation(actual, expected)


def test_without_scores_and_dicts_there_are_the_tokens_only(pair: Pair):
    tokens = pair.model.generate(TEXTS, max_new_tokens=4, eos_token_id=NEVER)
    assert tokens.tolist() == pair.whole.generate(TEXTS, max_new_tokens=4, eos_token_id=NEVER).tolist()
    actual, expected = pair.generate(input_ids=TEXTS)
    assert actual.scores is None
    assert actual.logits is None
    assert_same_generation(actual, expected)


class Prefers(LogitsProcessor):  # type: ignore[misc]
    """Makes a token likelier the longer the text is."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        scores_BV = scores_BV.clone()
        scores_BV[:, self.token] += 0.3 * ids_BT.shape[1]
        return scores_BV


def test_processors_and_criteria_of_ones_own_are_asked(pair: Pair):
    def says_so_twice(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        return (ids_BT[:, -2:] == 50).all(dim=1)

    actual, expected = pair.generate(
        input_ids=TEXTS,
        max_new_tokens=12,
        pad_token_id=0,
        logits_processor=[Prefers(50)],
        stopping_criteria=[says_so_twice],
        output_scores=True,
    )
    assert_same_generation(actual, expected)
    assert actual.sequences.shape[1] < TEXTS.shape[1] + 12, "the criterion stopped nothing"


@pytest.mark.parametrize("beams", [1, 3])
def test_only_tokens_that_are_allowed_come(pair: Pair, beams: int):
    allowed = [10, 20, 30, 40]
    actual, expected = pair.generate(
        input_ids=TEXTS, num_beams=beams, prefix_allowed_tokens_fn=lambda row, ids: allowed, output_scores=True
    )
    assert_same_generation(actual, expected)
    assert set(actual.sequences[:, TEXTS.shape[1] :].flatten().tolist()) <= set(allowed)


class Collects(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token_as_it_comes(pair: Pair):
    streamers = []
    for model in (pair.model, pair.whole):
        streamer = Collects()
        model.generate(TEXTS[:1], max_new_tokens=6, eos_token_id=NEVER, streamer=streamer)
        assert streamer.ended
        streamers.append(streamer.pieces)
    assert streamers[0] == streamers[1]
    assert len(streamers[0]) == 7


def test_a_text_that_begins_with_embeddings(pair: Pair):
    embeds = pair.whole.get_input_embeddings()(TEXTS).detach()
    actual, expected = pair.generate(inputs_embeds=embeds, output_logits=True)
    assert actual.sequences.shape == (3, 8)
    assert_same_generation(actual, expected)
    actual, expected = pair.generate(input_ids=TEXTS, inputs_embeds=embeds)
    assert actual.sequences.shape == (3, TEXTS.shape[1] + 8)
    assert_same_generation(actual, expected)


def test_a_text_that_begins_with_nothing_begins_with_the_first_token(pair: Pair):
    actual, expected = pair.generate(inputs=None, output_logits=True)
    assert_same_generation(actual, expected)


def test_a_text_goes_on_where_a_cache_ends(pair: Pair):
    said, expected = pair.generate(input_ids=TEXTS, max_new_tokens=4)
    assert_same_generation(said, expected)
    more = torch.cat((said.sequences, TEXTS[:, :2]), dim=1)
    results = []
    with pair.model.inference_session(max_length=32, batch_size=3) as session:
        pair.model.generate(TEXTS, max_new_tokens=4, eos_token_id=NEVER, session=session)
        results.append(pair.model.generate(more, max_new_tokens=4, eos_token_id=NEVER, session=session))
    results.append(
        pair.whole.generate(more, max_new_tokens=4, eos_token_id=NEVER, past_key_values=expected.past_key_values)
    )
    assert results[0].tolist() == results[1].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
def test_a_kind_of_cache_that_changes_no_number_changes_none_here(pair: Pair, cache: str):
    found = pair.model.generate(TEXTS, max_new_tokens=6, eos_token_id=NEVER, cache_implementation=cache)
    assert found.tolist() == pair.whole.generate(TEXTS, max_new_tokens=6, eos_token_id=NEVER).tolist()


def test_a_model_in_the_swarm_guesses_for_another(pair: Pair):
    text = TEXTS[:1, :5].repeat(1, 3)
    options = {"max_new_tokens": 8, "eos_token_id": NEVER}
    expected = pair.whole.generate(text, **options)
    for model, assistant in ((pair.model, pair.swarm.model()), (pair.whole, pair.model)):
        assert model.generate(text, assistant_model=assistant, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("negative", [False, True])
def test_guidance_gives_the_tokens_and_scores_of_transformers(pair: Pair, negative: bool):
    options = {"negative_prompt_ids": TEXTS.flip(0)[:, :4]} if negative else {}
    actual, expected = pair.generate(input_ids=TEXTS, guidance_scale=1.5, output_scores=True, **options)
    assert_same_generation(actual, expected)


def test_a_text_goes_on_with_the_cache_that_generate_returned(pair: Pair):
    results = []
    for said in pair.generate(input_ids=TEXTS, max_new_tokens=4):
        model = pair.whole if results else pair.model
        more = torch.cat((said.sequences, TEXTS[:, :2]), dim=1)
        options = {"max_new_tokens": 8, "eos_token_id": NEVER, "past_key_values": said.past_key_values}
        results.append(model.generate(more, **options).tolist())
    assert results[0] == results[1]


@torch.no_grad()
@pytest.mark.parametrize("mask", ["no padding", "padding on the left"])
def test_a_loop_written_by_hand_keeps_a_cache(pair: Pair, mask: str):
    inputs = pair.inputs(mask)
    steps = []
    for model in (pair.model, pair.whole):
        attention_mask = inputs.get("attention_mask", torch.ones_like(TEXTS))
        output = model(inputs["input_ids"], attention_mask=attention_mask, use_cache=True)
        logits = [output.logits[:, -1]]
        for _ in range(4):
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(3, 1)), dim=1)
            output = model(
                logits[-1].argmax(dim=-1, keepdim=True),
                attention_mask=attention_mask,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logits.append(output.logits[:, -1])
        steps.append(torch.stack(logits))
    assert_close(*steps)
