"""A small model guesses what it would write itself, whatever of its guesses the text has taken."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

from shoal.client.generation.drafting.model_drafter import DraftModel, ModelDrafter

from .tiny_drafts import NUM_WORDS, tiny


class Ticking:
    """A clock that shows a second more each time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


def written(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    ids = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(tokens) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mistral", {"sliding_window": 4}), ("gpt2", {})])
def test_it_guesses_what_it_would_write_behind_any_text(kind: str, options: dict[str, Any]) -> None:
    model, chance = tiny(kind, **options), Random(0)
    text = [chance.randrange(NUM_WORDS) for _ in range(7)]
    drafter = ModelDrafter(DraftModel(model, num_words=NUM_WORDS), text)
    for num_right in (0, 2, 4, 1, 3, 0, 4):
        guesses = drafter.guesses(4)
        assert guesses == written(model, text, 4)
        new = [*guesses[:num_right], chance.randrange(NUM_WORDS)]
        drafter.append(new)
        text += new


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mistral", {"sliding_window": 4}), ("gpt2", {})])
def test_behind_its_guesses_it_guesses_the_same_as_behind_a_text(kind: str, options: dict[str, Any]) -> None:
    model, chance = tiny(kind, **options), Random(0)
    text = [chance.randrange(NUM_WORDS) for _ in range(7)]
    drafter = ModelDrafter(DraftModel(model, num_words=NUM_WORDS), text)
    assumed: list[int] = []
    for num_right in (3, 3, 0, 2, 3, 1, 3):
        if not assumed:
            assumed = drafter.guesses(3)
        further = drafter.further(assumed, 2)
        assert [*assumed, *further] == written(model, text, len(assumed) + 2)
        if num_right == 3:
            new, assumed = assumed[:3], [*assumed[3:], *further]
        else:
            new, assumed = [*assumed[:num_right], chance.randrange(NUM_WORDS)], []
        drafter.append(new)
        text += new
    assert ModelDrafter(DraftModel(tiny("gpt2"), num_words=NUM_WORDS), [3] * 60).further([4, 4, 4], 9) != []
    assert ModelDrafter(DraftModel(tiny("gpt2"), num_words=NUM_WORDS), [3] * 60).further([4] * 5, 9) == []


def test_it_has_no_guesses_beyond_its_longest_text() -> None:
    model = tiny("gpt2")
    text = [3] * 62
    drafter = ModelDrafter(DraftModel(model, num_words=NUM_WORDS), text)
    assert drafter.guesses(10) == [*written(model, text, 2), drafter.guesses(10)[2]]
    drafter.append([4, 4])
    assert len(drafter.guesses(10)) == 1
    drafter.append([4])
    assert drafter.source() is None


def test_tokens_of_one_vocabulary_only_are_neither_read_nor_guessed() -> None:
    model = tiny("llama")
    drafter = ModelDrafter(DraftModel(model, num_words=10), [3, 4])
    assert all(guess < 10 for guess in drafter.guesses(20))
    drafter.append([10])
    assert drafter.source() is None


def test_it_reads_a_long_text_in_pieces_before_it_guesses() -> None:
    model, chance = tiny("llama"), Random(1)
    text = [chance.randrange(NUM_WORDS) for _ in range(55)]
    drafter = ModelDrafter(DraftModel(model, num_words=NUM_WORDS), text[:50])
    assert drafter.is_behind
    assert drafter.source() is None
    drafter.read_piece()
    assert not drafter.is_behind
    assert drafter.source() is not None
    assert drafter.guesses(3) == written(model, text[:50], 3)
    drafter.append(text[50:])
    assert drafter.guesses(3) == written(model, text, 3)


def test_it_does_not_read_what_it_cannot_guess_behind() -> None:
    draft = DraftModel(tiny("llama"), num_words=NUM_WORDS)
    for text in ([3] * 70, [3] * 40 + [NUM_WORDS]):
        drafter = ModelDrafter(draft, text)
        assert not drafter.is_behind
        assert drafter.source() is None


def test_it_says_how_long_a_guess_takes_and_leaves_out_what_a_prompt_takes() -> None:
    draft = DraftModel(tiny("llama"), num_words=NUM_WORDS, clock=Ticking())
    assert draft.time.seconds_each == 1.0
    drafter = ModelDrafter(draft, [5] * 20)
    drafter.guesses(4)
    assert draft.time.seconds_each == 1.0
    drafter.append([6])
    drafter.guesses(4)
    source = drafter.source()
    assert source is not None
    assert 0.25 < source.seconds_each < 1.0
