"""Steps that carry guesses give the tokens of Transformers' `generate()`, whatever is guessed and whatever fails."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal import UserError
from shoal.client.generation.drafting.drafter import Source
from shoal.client.head import logits

from .harness import Swarm
from .test_remote_head import REMOTE, swarm_with_head, without_head
from .test_streams import CONFIGS, PROMPTS, all_of, expected

MakeSwarm = Callable[..., Swarm]
MakeDrafter = Callable[..., Any]

NUM_TOKENS = 16
"""What `expected` generates."""


class Foreseeing:
    """Knows how the text goes on, and lies from time to time: `is_right` says of each position whether it tells."""

    def __init__(self, text: Sequence[int], is_right: Callable[[int], bool]) -> None:
        self.text, self.is_right, self.position = list(text), is_right, 0
        self.num_asked = 0

    def append(self, tokens: Sequence[int]) -> None:
        self.position += len(tokens)

    def source(self) -> Source | None:
        return Source("test", 0.5)

    def guesses(self, count: int) -> list[int]:
        self.num_asked += 1
        places = range(self.position, self.position + count)
        ahead = [self.text[place] if place < len(self.text) else 1 for place in places]
        return [token if self.is_right(place) else (token + 1) % 97 for place, token in zip(places, ahead, strict=True)]


class FarSighted(Foreseeing):
    """The same, and guesses behind its own guesses, so that several rounds are under way."""

    def __init__(self, text: Sequence[int], is_right: Callable[[int], bool]) -> None:
        super().__init__(text, is_right)
        self.num_further = 0

    def further(self, assumed: Sequence[int], count: int) -> list[int]:
        self.num_further += 1
        self.position += len(assumed)
        found = self.guesses(count)
        self.position -= len(assumed)
        self.num_asked -= 1
        return found


def always(place: int) -> bool:
    return True


def never(place: int) -> bool:
    return False


def mostly(place: int) -> bool:
    return place % 3 != 0


def every_other(place: int) -> bool:
    return place % 2 == 0


DRAFTS = [always, never, mostly, every_other]


def foreseeing(prompt: torch.Tensor, wanted: Sequence[int], is_right: Callable[[int], bool]) -> Foreseeing:
    return Foreseeing([*prompt[0].tolist(), *wanted], is_right)


def far_sighted(prompt: torch.Tensor, wanted: Sequence[int], is_right: Callable[[int], bool]) -> FarSighted:
    return FarSighted([*prompt[0].tolist(), *wanted], is_right)


def counted_trips(model: Any, prompt: torch.Tensor, drafter: Foreseeing, **options: Any) -> tuple[list[int], int]:
    """The tokens, and how many steps it took."""
    tokens = [token.id for token in model.stream(prompt, max_new_tokens=NUM_TOKENS, draft=drafter, **options)]
    return tokens, drafter.num_asked


@pytest.mark.parametrize("drafter", [foreseeing, far_sighted])
@pytest.mark.parametrize(
    ("is_right", "num_guesses"), [(always, 5), (always, 1), (never, 1), (mostly, 5), (mostly, 1), (every_other, 3)]
)
def test_whatever_is_guessed_the_tokens_are_those_of_generate(
    swarm: MakeSwarm, whole: PreTrainedModel, is_right: Callable[[int], bool], num_guesses: int, drafter: MakeDrafter
):
    model = swarm("0:2", "2:4").model()

    async def text(prompt: torch.Tensor, seed: int, options: dict[str, Any], wanted: Sequence[int]) -> list[int]:
        draft = drafter(prompt, wanted, is_right)
        stream = model.stream(
            prompt, max_new_tokens=NUM_TOKENS, draft=draft, num_guesses=num_guesses, seed=seed, **options
        )
        return [token.id async for token in stream]

    async def all_of(cases: Sequence[Any]) -> list[list[int]]:
        return list(await asyncio.gather(*(text(*case) for case in cases)))

    cases = [
        (prompt, seed, options, expected(whole, prompt, seed, options))
        for seed, (options, prompt) in enumerate(zip(CONFIGS, itertools.cycle(PROMPTS), strict=False))
    ]
    for found, (*case, wanted) in zip(asyncio.run(all_of(cases)), cases, strict=True):
        assert found == wanted, case


def test_right_guesses_save_trips_and_wrong_ones_cost_none(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    wanted = expected(whole, PROMPTS[0], 0, {})
    trips = {}
    for is_right in DRAFTS:
        drafter = foreseeing(PROMPTS[0], wanted, is_right)
        tokens, trips[is_right] = counted_trips(model, PROMPTS[0], drafter, num_guesses=3)
        assert tokens == wanted
    # The first token comes with the prompt. Nothing is guessed when only one token is missing.
    assert trips[always] == 4
    assert trips[never] == NUM_TOKENS - 2


def test_behind_a_round_that_was_right_several_are_under_way(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    wanted = expected(whole, PROMPTS[0], 0, {})
    for is_right, num_alone, num_right in ((always, 2, 13), (never, NUM_TOKENS - 2, 0)):
        drafter = far_sighted(PROMPTS[0], wanted, is_right)
        with model.stream(PROMPTS[0], max_new_tokens=NUM_TOKENS, draft=drafter, num_guesses=3) as stream:
            assert [token.id for token in stream] == wanted
        # Only the first two rounds of those that are all right wait for the ones before them.
        assert (drafter.num_asked, stream.num_right) == (num_alone, num_right)


@pytest.mark.parametrize(
    ("drafter", "is_right", "num_guesses"),
    [(foreseeing, mostly, 4), (far_sighted, mostly, 1), (far_sighted, always, 1), (far_sighted, always, 4)],
)
def test_guesses_are_right_through_the_loss_of_servers(
    swarm: MakeSwarm,
    whole: PreTrainedModel,
    drafter: MakeDrafter,
    is_right: Callable[[int], bool],
    num_guesses: int,
):
    net = swarm("0:2", "2:4", "0:2", "2:4", "0:2", "2:4")
    model = net.model()
    wanted = expected(whole, PROMPTS[0], 0, {})
    with model.inference_session(max_length=64) as session:
        draft = drafter(PROMPTS[0], wanted, is_right)
        stream = model.stream(
            PROMPTS[0], max_new_tokens=NUM_TOKENS, draft=draft, num_guesses=num_guesses, session=session
        )
        found = []
        for token in stream:
            found.append(token.id)
            if len(found) in (3, 9):
                net.kill(session.servers[len(found) == 9])
        assert session.num_tokens == PROMPTS[0].shape[1] + NUM_TOKENS - 1
    assert found == wanted


@pytest.mark.parametrize(("drafter", "is_right"), [(foreseeing, never), (far_sighted, always)])
def test_a_session_that_was_guessed_in_can_be_continued(
    swarm: MakeSwarm, whole: PreTrainedModel, drafter: MakeDrafter, is_right: Callable[[int], bool]
):
    model = swarm("0:2", "2:4").model()
    wanted = expected(whole, PROMPTS[0], 0, {})
    with model.inference_session(max_length=64) as session:
        draft = drafter(PROMPTS[0], wanted, is_right)
        first = [each.id for each in model.stream(PROMPTS[0], max_new_tokens=7, draft=draft, num_guesses=2)]
        assert session.num_tokens == PROMPTS[0].shape[1] + 6
        second = model.generate(None, max_new_tokens=5)[0].tolist()
    assert first + second == wanted[:12]


def test_a_text_that_ends_while_others_are_under_way_can_be_continued(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    wanted = expected(whole, PROMPTS[0], 0, {})
    end = next(index for index in range(6, NUM_TOKENS - 1) if wanted[index] not in wanted[:index])
    with model.inference_session(max_length=64) as session:
        draft = far_sighted(PROMPTS[0], wanted, always)
        first = list(model.stream(PROMPTS[0], max_new_tokens=40, eos_token_id=wanted[end], draft=draft, num_guesses=1))
        assert first[-1].finish_reason == "stop"
        assert session.num_tokens == PROMPTS[0].shape[1] + end
        second = model.generate(None, max_new_tokens=NUM_TOKENS - 1 - end)[0].tolist()
    assert [each.id for each in first] + second == wanted


@pytest.mark.parametrize("head_top_k", [None, 8])
def test_a_servers_head_answers_for_all_guesses(swarm: MakeSwarm, whole: PreTrainedModel, head_top_k: int | None):
    model = swarm_with_head(swarm, "0:2", "2:4").model(config=replace(REMOTE, head_top_k=head_top_k))
    wanted = expected(whole, PROMPTS[0], 0, {})
    for is_right, drafter in itertools.product(DRAFTS, (foreseeing, far_sighted)):
        draft = drafter(PROMPTS[0], wanted, is_right)
        assert counted_trips(without_head(model), PROMPTS[0], draft, num_guesses=2)[0] == wanted


@pytest.mark.parametrize("is_right", [always, mostly])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_servers_head_answers_for_several_rounds_when_a_server_is_lost(
    swarm: MakeSwarm, whole: PreTrainedModel, is_right: Callable[[int], bool], lost: int
):
    net = swarm_with_head(swarm, "0:2", "2:4")
    net.start("0:2")
    net.start("2:4", serve_head=True)
    model = without_head(net.model(config=REMOTE))
    wanted = expected(whole, PROMPTS[0], 0, {})
    with model.inference_session(max_length=64) as session:
        draft = far_sighted(PROMPTS[0], wanted, is_right)
        found = []
        for token in model.stream(PROMPTS[0], max_new_tokens=NUM_TOKENS, draft=draft, num_guesses=1, session=session):
            found.append(token.id)
            if len(found) == 5:
                net.kill(session.servers[lost])
    assert found == wanted


def test_no_more_is_guessed_than_an_answer_can_have_logits_for(
    swarm: MakeSwarm, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    model = without_head(swarm_with_head(swarm, "0:2", "2:4").model(config=REMOTE))
    monkeypatch.setattr(logits, "MAX_LOGITS_BYTES", 3 * whole.config.vocab_size * 4)
    wanted = expected(whole, PROMPTS[0], 0, {})
    tokens, trips = counted_trips(model, PROMPTS[0], foreseeing(PROMPTS[0], wanted, always), num_guesses=6)
    assert tokens == wanted
    assert trips == (NUM_TOKENS - 1) // 3  # each step gives two guesses and one more token


def test_a_text_that_repeats_itself_is_guessed_from_itself(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    prompt = torch.tensor([[5, 17, 42, 9, 33] * 6])
    for seed in range(3):
        options = {"do_sample": bool(seed), "temperature": 0.3}
        tokens = model.stream(prompt, max_new_tokens=NUM_TOKENS, num_guesses=3, seed=seed, **options)
        assert [each.id for each in tokens] == expected(whole, prompt, seed, options)


def test_generate_with_a_draft_has_the_sequences_of_transformers(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    ids = torch.tensor([[0, 0, 5, 17, 42, 5, 17], [8, 61, 7, 8, 61, 7, 8], [0, 0, 0, 0, 0, 0, 31]])
    mask = (ids != 0).long()
    for options in ({}, {"eos_token_id": [3, 11, 60]}, {"repetition_penalty": 1.3}):
        how = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, **options}
        found = model.generate(ids, draft="auto", num_guesses=4, **how)
        assert found.tolist() == whole.generate(ids, **how).tolist()


def test_generate_with_a_draft_continues_a_session_and_follows_the_seed(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    wanted = expected(whole, PROMPTS[0], 0, {})
    with model.inference_session(max_length=64):
        first = model.generate(PROMPTS[0], draft="auto", max_new_tokens=6)
        second = model.generate(None, draft="auto", max_new_tokens=4)
    assert first[0].tolist() + second[0].tolist() == [*PROMPTS[0][0].tolist(), *wanted[:10]]
    sampled = []
    for _ in range(2):
        torch.manual_seed(7)
        sampled.append(model.generate(PROMPTS[0], draft="auto", do_sample=True, max_new_tokens=16).tolist())
    assert sampled[0] == sampled[1]


class Unreadable(Foreseeing):
    """Fails when it is asked how much it has still to read."""

    @property
    def is_behind(self) -> bool:
        raise ValueError("a drafter's mistake")

    def read_piece(self) -> None: ...


@pytest.mark.parametrize("kind", [Foreseeing, Unreadable])
def test_a_drafter_that_does_wrong_ends_its_own_text_only(
    swarm: MakeSwarm, whole: PreTrainedModel, kind: type[Foreseeing]
):
    model = swarm("0:2", "2:4").model()
    wanted = expected(whole, PROMPTS[0], 0, {})

    async def both() -> tuple[Any, ...]:
        draft = kind([97] * 100, always)  # no token of the model
        return tuple(
            await asyncio.gather(
                all_of(model, PROMPTS[0], draft=draft, num_guesses=3),
                all_of(model, PROMPTS[0]),
                return_exceptions=True,
            )
        )

    wrong, right = asyncio.run(both())
    assert isinstance(wrong, ValueError)
    assert right == wanted


def test_a_draft_that_does_not_exist_is_refused(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with pytest.raises(UserError, match="'tree' is not a way to guess tokens"):
        model.stream(PROMPTS[0], draft="tree")
    with pytest.raises(UserError, match="num_guesses=1000"):
        model.stream(PROMPTS[0], num_guesses=1000)
