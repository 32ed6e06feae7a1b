"""Small models guess for a distributed one: the text is that of plain Transformers, whatever they guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from shoal import CheckpointError, UnsupportedOperation, UserError
from shoal.client.generation import generation_engine
from shoal.client.generation.drafting.model_drafter import DraftModel, ModelDrafter

from .harness import QUICK, Swarm, swarm_of
from .test_streams import CONFIGS, PROMPTS, expected

MakeSwarm = Callable[..., Swarm]

NUM_TOKENS = 16
"""What `expected` generates."""


@pytest.fixture(scope="session")
def other(other_folder: Path) -> PreTrainedModel:
    """A model that knows nothing of what the other one writes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(other_folder, dtype=torch.float32)
    return model.eval()


def small(vocab_size: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **options)).eval()


def with_tokenizer(model: PreTrainedModel, folder: Path, words: int, first: str = "a") -> Path:
    model.save_pretrained(folder)
    vocabulary = {first: 0} | {f"word{index}": index for index in range(1, words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=first)).save(str(folder / "tokenizer.json"))
    return folder


def test_a_draft_changes_no_token(swarm: MakeSwarm, whole: PreTrainedModel, other: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    drafts = [whole, other, small(97, max_position_embeddings=12)]
    for seed, options in enumerate(CONFIGS):
        prompt, draft = PROMPTS[seed % len(PROMPTS)], drafts[seed % len(drafts)]
        stream = model.stream(prompt, max_new_tokens=NUM_TOKENS, draft=draft, num_guesses=3, seed=seed, **options)
        assert [token.id for token in stream] == expected(whole, prompt, seed, options), options


def test_a_perfect_draft_is_always_right_and_one_of_another_seed_seldom(
    swarm: MakeSwarm, whole: PreTrainedModel, other: PreTrainedModel
):
    model = swarm("0:4").model()
    right = []
    for guessing in (whole, other):
        drafter = ModelDrafter(DraftModel(guessing, num_words=97))
        stream = model.stream(PROMPTS[0], max_new_tokens=NUM_TOKENS, draft=drafter, num_guesses=4)
        assert [token.id for token in stream] == expected(whole, PROMPTS[0], 0, {})
        right.append(stream.num_right / stream.num_guessed)
    assert right[0] == 1.0
    assert right[1] < 0.3


def test_a_draft_guesses_through_the_loss_of_servers(swarm: MakeSwarm, whole: PreTrainedModel):
    net = swarm("0:2", "2:4", "0:2", "2:4", "0:2", "2:4")
    model = net.model()
    with model.inference_session(max_length=64) as session:
        found = []
        drafter = ModelDrafter(DraftModel(whole, num_words=97))
        for token in model.stream(PROMPTS[0], max_new_tokens=NUM_TOKENS, draft=drafter, num_guesses=3):
            found.append(token.id)
            if len(found) in (3, 9):
                net.kill(session.servers[len(found) == 9])
    assert found == expected(whole, PROMPTS[0], 0, {})


def test_a_long_prompt_is_read_while_the_servers_compute(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    prompt = 1 + torch.arange(80)[None] * 31 % 96
    drafter = ModelDrafter(DraftModel(whole, num_words=97))
    stream = model.stream(prompt, max_new_tokens=NUM_TOKENS, draft=drafter, num_guesses=3)
    assert [token.id for token in stream] == expected(whole, prompt, 0, {})
    assert stream.num_right == stream.num_guessed > 6


def test_a_draft_that_fails_ends_its_own_text_only(swarm: MakeSwarm, whole: PreTrainedModel):
    model, failing = swarm("0:2", "2:4").model(), small(97)
    draft = DraftModel(failing, num_words=97)
    del failing.lm_head
    others = model.stream(PROMPTS[1], max_new_tokens=NUM_TOKENS)
    for prompt in (PROMPTS[0], torch.full((1, 80), 5)):
        with pytest.raises(AttributeError):
            list(model.stream(prompt, max_new_tokens=NUM_TOKENS, draft=ModelDrafter(draft), num_guesses=2))
    assert [token.id for token in others] == expected(whole, PROMPTS[1], 0, {})


def test_texts_at_the_same_time_share_the_passes_of_a_draft(
    swarm: MakeSwarm, whole: PreTrainedModel, other: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    """Each turn of the engine waits until the steps of all are here, so that they guess in the same ones."""
    monkeypatch.setattr(generation_engine, "COMPANY_SECONDS", 60.0)
    model = swarm("0:2", "2:4").model()
    prompts = [*PROMPTS, torch.cat((PROMPTS[0], PROMPTS[1]), dim=1)]
    wanted = [(prompt, seed, options) for seed, options in enumerate(CONFIGS) for prompt in prompts]
    wished = [expected(whole, prompt, seed, options) for prompt, seed, options in wanted]
    num_passes = []
    for draft in (whole, other):
        sizes: list[int] = []

        def note(_: Any, __: Any, given: dict[str, Any], sizes: list[int] = sizes) -> None:
            sizes.append(len(given["input_ids"]))

        model.stream(PROMPTS[0], max_new_tokens=1, draft=draft).close()  # opened
        hook = draft.register_forward_pre_hook(note, with_kwargs=True)
        try:
            how = {"max_new_tokens": NUM_TOKENS, "draft": draft, "num_guesses": 3}
            streams = [model.stream(prompt, seed=seed, **how, **options) for prompt, seed, options in wanted]
            found = [[token.id for token in stream] for stream in streams]
        finally:
            hook.remove()
        assert found == wished
        num_passes.append((len(sizes), sum(sizes), max(sizes)))
    for passes, of_texts, largest in num_passes:
        assert largest > 1
        assert passes < of_texts / 2


def test_a_batch_has_a_draft_for_each_text(swarm: MakeSwarm, whole: PreTrainedModel, other_folder: Path):
    model = swarm("0:2", "2:4").model()
    ids = torch.tensor([[0, 0, 5, 17, 42, 5, 17], [8, 61, 7, 8, 61, 7, 8]])
    how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "pad_token_id": 0}
    for draft in (whole, other_folder):
        assert model.generate(ids, draft=draft, num_guesses=4, **how).tolist() == whole.generate(ids, **how).tolist()


def test_a_draft_that_the_model_was_opened_with_is_read_once(
    swarm: MakeSwarm, whole: PreTrainedModel, other_folder: Path
):
    model = swarm("0:4").model(config=replace(QUICK, draft=other_folder))
    draft = model.draft_models.draft(other_folder)
    assert model.draft_models.draft(str(other_folder)) is draft
    tokens = model.stream(PROMPTS[0], max_new_tokens=NUM_TOKENS, num_guesses=3)
    assert [token.id for token in tokens] == expected(whole, PROMPTS[0], 0, {})


def test_a_draft_with_other_words_is_refused(tmp_path: Path):
    target = with_tokenizer(small(97), tmp_path / "target", 90)
    padded = with_tokenizer(small(128), tmp_path / "padded", 90)
    others = with_tokenizer(small(97), tmp_path / "others", 90, first="b")
    without = tmp_path / "without"
    small(128).save_pretrained(without)
    whole = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with swarm_of(target, "0:1") as net:
        model = net.model()
        found = model.generate(PROMPTS[0], draft=padded, num_guesses=3, max_new_tokens=8)
        assert found.tolist() == whole.generate(PROMPTS[0], max_new_tokens=8).tolist()
        with pytest.raises(UserError, match="their tokenizers differ"):
            model.stream(PROMPTS[0], draft=others)
        for draft in (without, small(128)):
            with pytest.raises(UserError, match="128 tokens in its vocabulary, and the model has 97"):
                model.stream(PROMPTS[0], draft=draft)
        with pytest.raises(UserError, match="128 tokens"):
            net.model(config=replace(QUICK, draft=without))


def test_what_cannot_guess_is_refused(swarm: MakeSwarm, tmp_path: Path):
    net = swarm("0:4")
    model = net.model()
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedOperation, match="cannot take back"):
        model.stream(PROMPTS[0], draft=MambaForCausalLM(config))
    with pytest.raises(UnsupportedOperation, match="on servers does not guess"):
        model.stream(PROMPTS[0], draft=net.model())
    with pytest.raises(UserError, match="3 is not a way to guess"):
        model.stream(PROMPTS[0], draft=3)
    with pytest.raises(UserError, match="there is no folder"):
        model.stream(PROMPTS[0], draft="./nowhere")
    torch.save({}, tmp_path / "pytorch_model.bin")
    small(97).config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        model.stream(PROMPTS[0], draft=tmp_path)


def test_assistants_and_prompt_lookup_guess_in_streams(swarm: MakeSwarm, whole: PreTrainedModel):
    """Transformers' own loop refuses a batch."""
    model = swarm("0:2", "2:4").model()
    ids = torch.tensor([[5, 17, 42, 5, 17], [8, 61, 7, 8, 61]])
    expected_ids = whole.generate(ids, max_new_tokens=12).tolist()
    for how in ({"assistant_model": whole}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(ids, max_new_tokens=12, **how).tolist() == expected_ids
        found = model.generate(ids[:1], max_new_tokens=12, return_dict_in_generate=True, **how)  # by that loop
        assert found.sequences.tolist() == expected_ids[:1]
