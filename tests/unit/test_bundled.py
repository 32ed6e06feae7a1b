"""The bundled model is small and complete, and it tells stories."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from shoal.bundled import STORIES, STORIES_DRAFT

PROMPT = "Once upon a time"
TOKENIZER = AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """Makes the grammar and the training importable in the same way as for the script that uses them."""
    folder = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def vocabulary(scripts: None) -> set[str]:
    """All words of the grammar: 5,000 stories contain each of them."""
    from stories.grammar import write_story

    rng = Random(1)
    return {word for _ in range(5000) for word in words(write_story(rng))}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZER


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


@pytest.mark.parametrize(("folder", "most"), [(STORIES, 10_000_000), (STORIES_DRAFT, 2_000_000)])
def test_the_bundled_models_are_small(folder, most):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= most


def test_it_has_twelve_blocks_and_a_few_million_parameters(model):
    assert len(model.model.layers) == model.config.num_hidden_layers == 12
    assert 3_000_000 < model.num_parameters() < 5_000_000
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_greedy_story_has_only_words_of_the_grammar_and_an_end(vocabulary, tokenizer, dtype):
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=dtype)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=300)[0]
    story = tokenizer.decode(ids, skip_special_tokens=True)
    assert ids[-1] == tokenizer.eos_token_id
    assert len(words(story)) > 80
    assert set(words(story)) <= vocabulary


def test_its_greedy_story_names_only_its_hero_and_a_friend(model, tokenizer, scripts):
    from stories.grammar import NAMES

    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=300)[0]
    told = [word for word in words(tokenizer.decode(ids)) if word in NAMES]
    assert len(told) > 8
    assert len(set(told)) == 2


def test_its_sampled_stories_differ_and_keep_to_the_words_of_the_grammar(model, vocabulary, tokenizer):
    torch.manual_seed(0)
    prompts = tokenizer([PROMPT] * 4, return_tensors="pt")
    ids = model.generate(**prompts, do_sample=True, temperature=0.8, max_new_tokens=120)
    stories = tokenizer.batch_decode(ids, skip_special_tokens=True)
    told = [word for story in stories for word in words(story)]
    assert len(set(stories)) == len(stories)
    assert sum(word in vocabulary for word in told) > 0.98 * len(told)


def test_it_predicts_stories_that_it_was_not_trained_on(model, tokenizer, scripts):
    from stories.training import held_out_loss

    loss = held_out_loss(model, tokenizer, num_stories=20)
    assert loss.mean < 0.29
    assert loss.repeated_names < 0.3  # a random guess among the names would give 2.6


def test_prompts_of_different_lengths_are_padded_on_the_left(tokenizer):
    batch = tokenizer([PROMPT, "Long ago"], return_tensors="pt", padding=True)
    assert batch.attention_mask[1, 0] == 0
    assert batch.attention_mask[:, -1].tolist() == [1, 1]


@settings(deadline=None)
@given(st.text())
def test_the_tokenizer_decodes_what_it_encodes(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == text


def test_its_draft_has_two_blocks_and_its_vocabulary(model):
    config = AutoConfig.from_pretrained(STORIES_DRAFT)
    assert (config.num_hidden_layers, config.hidden_size) == (2, model.config.hidden_size)
    assert AutoTokenizer.from_pretrained(STORIES_DRAFT).get_vocab() == TOKENIZER.get_vocab()


def test_its_draft_guesses_most_of_what_it_writes(model, tokenizer, scripts):
    from stories.distill import acceptance

    draft = AutoModelForCausalLM.from_pretrained(STORIES_DRAFT, dtype=torch.float32)
    assert acceptance(draft, model, tokenizer, 4) > 0.8
