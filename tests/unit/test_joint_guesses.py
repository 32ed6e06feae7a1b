"""Texts that guess at the same time share passes of their draft model, and each has the guesses that it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

from shoal.client.generation.drafting.drafter import Drafter, Made, Source
from shoal.client.generation.drafting.joint_check import follows_the_longest
from shoal.client.generation.drafting.model_drafter import DraftModel, ModelDrafter
from shoal.client.generation.drafting.wishes import Wish, grant

from . import tiny_drafts
from .tiny_drafts import NUM_WORDS

KINDS = [
    ("llama", {}),
    ("mistral", {"sliding_window": 4}),
    ("gpt2", {}),
    ("bloom", {"n_head": 2}),  # ALiBi
    ("gemma3_text", {"head_dim": 8, "sliding_window": 4}),  # layers of two kinds
    ("llama4_text", {"head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}),
]
CHANCE = Source("chance", 0.5)


def tiny(kind: str = "llama", **options: Any) -> Any:
    return tiny_drafts.tiny(kind, **{"num_hidden_layers": 4, "max_position_embeddings": 128, **options})


def words(count: int, chance: Random) -> list[int]:
    return [chance.randrange(NUM_WORDS) for _ in range(count)]


def wishes(drafters: Sequence[Drafter], counts: Sequence[int]) -> list[Wish]:
    return [Wish(drafter, CHANCE, count) for drafter, count in zip(drafters, counts, strict=True)]


def tokens_of(made: Sequence[Made | Exception]) -> list[list[int]]:
    assert all(isinstance(each, Made) for each in made), made
    return [list(each.tokens) for each in made if isinstance(each, Made)]


class Passes:
    """Counts the passes of a model, and has the sizes of their batches. It can be told to fail at batches."""

    def __init__(self, model: Any) -> None:
        self.sizes: list[int] = []
        self.fails_at_batches = False
        self.fails_behind: int | None = None
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: Any, args: Any, given: dict[str, Any]) -> None:
        ids_BS = given["input_ids"]
        self.sizes.append(len(ids_BS))
        if self.fails_at_batches and len(ids_BS) > 1:
            raise RuntimeError("no memory for a batch")
        if self.fails_behind is not None and bool((ids_BS == self.fails_behind).any()):
            raise ArithmeticError("a token that breaks it")


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_guesses_in_company_are_those_alone(kind: str, options: dict[str, Any]) -> None:
    draft, chance = DraftModel(tiny(kind, **options), num_words=NUM_WORDS), Random(1)
    assert draft.guesses_together
    texts = {name: words(length, chance) for name, length in enumerate((7, 1, 19, 30, 2))}
    alone = {name: ModelDrafter(draft, text) for name, text in texts.items()}
    together = {name: ModelDrafter(draft, text) for name, text in texts.items()}
    for turn in range(8):
        taking_part = [name for name in texts if chance.random() < 0.8] or [turn % len(texts)]
        counts = [chance.randrange(1, 6) for _ in taking_part]
        found = tokens_of(grant(wishes([together[name] for name in taking_part], counts)))
        assert found == [alone[name].guesses(count) for name, count in zip(taking_part, counts, strict=True)]
        for name, guesses in zip(taking_part, found, strict=True):
            new = [*guesses[: chance.randrange(len(guesses) + 1)], chance.randrange(NUM_WORDS)]
            alone[name].append(new)
            together[name].append(new)
            if chance.random() < 0.3:
                assert together[name].further([5], 2) == alone[name].further([5], 2)


def test_texts_share_passes_and_leave_them_when_they_have_what_they_want() -> None:
    model, chance = tiny(), Random(2)
    draft = DraftModel(model, num_words=NUM_WORDS)
    passes = Passes(model)
    drafters = [ModelDrafter(draft, words(length, chance)) for length in (9, 10, 11)]
    found = tokens_of(grant(wishes(drafters, (2, 5, 3))))
    assert [len(each) for each in found] == [2, 5, 3]
    assert passes.sizes == [3, 3, 2, 1, 1]


def test_one_text_alone_guesses_as_it_does_without_others() -> None:
    model = tiny()
    draft = DraftModel(model, num_words=NUM_WORDS)
    seen: list[set[str]] = []
    model.register_forward_pre_hook(lambda model, args, given: seen.append(set(given)), with_kwargs=True)
    grant(wishes([ModelDrafter(draft, [3, 4, 5])], [2]))
    assert all("attention_mask" not in each for each in seen)
    assert len(seen) == 2


def test_texts_without_room_have_no_guesses_and_the_others_have_theirs() -> None:
    draft = DraftModel(tiny(max_position_embeddings=12), num_words=NUM_WORDS)
    texts = [[3] * 12, [4] * 13, [5] * 3]
    drafters = [ModelDrafter(draft, text) for text in texts]
    found = tokens_of(grant(wishes(drafters, (4, 4, 4))))
    assert [len(each) for each in found] == [1, 0, 4]
    assert found[2] == ModelDrafter(draft, texts[2]).guesses(4)


def test_a_text_that_breaks_the_model_ends_and_the_others_have_their_guesses() -> None:
    model, chance = tiny(), Random(3)
    draft = DraftModel(model, num_words=NUM_WORDS)
    passes = Passes(model)
    texts = [[token % 40 for token in words(6, chance)] for _ in range(3)]
    drafters = [ModelDrafter(draft, text) for text in texts]
    expected = [ModelDrafter(draft, text).guesses(3) for text in texts]
    passes.fails_behind = 45
    drafters[1].append([45])
    made = grant(wishes(drafters, (3, 3, 3)))
    assert isinstance(made[1], ArithmeticError)
    assert tokens_of([made[0], made[2]]) == [expected[0], expected[2]]
    assert draft.guesses_together  # it was that text's fault


def test_a_model_that_fails_at_batches_guesses_for_one_text_after_another() -> None:
    model, chance = tiny(), Random(4)
    passes = Passes(model)
    passes.fails_at_batches = True
    assert not DraftModel(model, num_words=NUM_WORDS).guesses_together
    passes.fails_at_batches = False
    draft = DraftModel(model, num_words=NUM_WORDS)
    assert draft.guesses_together
    texts = [words(length, chance) for length in (6, 8)]
    drafters = [ModelDrafter(draft, text) for text in texts]
    passes.fails_at_batches = True  # from the third pass on
    expected = [ModelDrafter(draft, text).guesses(4) for text in texts]
    assert tokens_of(grant(wishes(drafters, (4, 4)))) == expected
    assert not draft.guesses_together
    passes.sizes.clear()
    assert tokens_of(grant(wishes(drafters, (4, 4)))) == expected
    assert set(passes.sizes) == {1}


def test_passes_that_fail_on_the_way_change_nothing_of_the_texts_that_left_before() -> None:
    model, chance = tiny(), Random(5)
    draft = DraftModel(model, num_words=NUM_WORDS)
    texts = [words(length, chance) for length in (6, 8)]
    expected = [ModelDrafter(draft, text).guesses(5) for text in texts]
    drafters = [ModelDrafter(draft, text) for text in texts]
    passes = Passes(model)
    passes.fails_behind = expected[1][2]
    made = grant(wishes(drafters, (1, 5)))
    passes.fails_behind = None
    assert isinstance(made[1], ArithmeticError)
    assert tokens_of(made[:1]) == [expected[0][:1]]
    assert tokens_of(grant(wishes(drafters[:1], (5,)))) == expected[:1]


class Ignoring(torch.nn.Module):
    """A model that takes a mask and does not use it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        return self.model(input_ids=input_ids, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("model"), name) if name.startswith("get_") else super().__getattr__(name)


def test_a_model_whose_masks_do_not_work_guesses_for_one_text_after_another() -> None:
    draft = DraftModel(Ignoring(tiny()), num_words=NUM_WORDS)
    assert not draft.guesses_together
    drafter = ModelDrafter(draft, [3, 4, 5])
    assert drafter.company is None
    assert tokens_of(grant(wishes([drafter, ModelDrafter(draft, [3])], (2, 2))))[0] == drafter.guesses(2)


def test_a_model_whose_positions_follow_the_longest_text_guesses_for_one_after_another() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny(rope_parameters=rope)
    assert follows_the_longest(model.config)
    assert not DraftModel(model, num_words=NUM_WORDS).guesses_together
    assert not follows_the_longest(tiny("gemma3_text", head_dim=8).config)


class Scripted:
    """A drafter of a program."""

    def __init__(self, tokens: list[int] | None) -> None:
        self._tokens = tokens

    def append(self, tokens: Sequence[int]) -> None:
        pass

    def source(self) -> Source | None:
        return CHANCE

    def guesses(self, count: int) -> list[int]:
        if self._tokens is None:
            raise KeyError("scripted")
        return self._tokens[:count]


def test_each_drafter_is_asked_by_itself_or_in_its_company() -> None:
    models = [tiny(), tiny("gpt2")]
    passes = [Passes(model) for model in models]
    drafts = [DraftModel(model, num_words=NUM_WORDS) for model in models]
    for each in passes:
        each.sizes.clear()
    own = [ModelDrafter(drafts[index], [3, 4, 5]) for index in (0, 1, 0, 1)]
    found = grant(wishes([own[0], Scripted([7, 8, 9]), own[1], Scripted(None), own[2], own[3]], [2] * 6))
    assert isinstance(found.pop(3), KeyError)
    tokens = tokens_of(found)
    assert tokens[1] == [7, 8]
    assert tokens[0] == tokens[3] == ModelDrafter(drafts[0], [3, 4, 5]).guesses(2)
    assert tokens[2] == tokens[4] == ModelDrafter(drafts[1], [3, 4, 5]).guesses(2)
    assert [each.sizes[:2] for each in passes] == [[2, 2], [2, 2]]


class Ticking:
    """A clock that shows as many seconds as passes were made, and a half for each pass with company."""

    def __init__(self) -> None:
        self.passes: Passes | None = None

    def __call__(self) -> float:
        return 0.0 if self.passes is None else sum(1 + 0.5 * (size > 1) for size in self.passes.sizes)


def test_each_text_is_charged_the_passes_that_it_takes_part_in() -> None:
    clock, model = Ticking(), tiny()
    draft = DraftModel(model, num_words=NUM_WORDS, clock=clock)
    assert draft.time.seconds_each == 0.0
    clock.passes = Passes(model)
    drafters = [ModelDrafter(draft, [3, 4, 5, index]) for index in range(3)]
    made = grant(wishes(drafters, (1, 4, 2)), clock)
    assert [each.seconds for each in made if isinstance(each, Made)] == [1.5, 5.0, 3.0]
    assert draft.time.seconds_each == pytest.approx(0.1 * 5.0 / 4)
