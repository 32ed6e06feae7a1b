"""Sessions that calls inside of a `with` block go on with, as in PETALS."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from shoal import UserError

from .harness import Swarm
from .parity import assert_equal

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
MORE = torch.tensor([[8, 61]])
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def model(swarm: MakeSwarm) -> Any:
    return swarm("0:2", "2:4").model()


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def test_generate_goes_on_with_the_session_around_it(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=64):
        first = model.generate(PROMPT, max_new_tokens=4)
        second = model.generate(None, max_new_tokens=3)
        third = model.generate(MORE, max_new_tokens=4)
        fourth = model.generate(max_new_tokens=2)
    spoken = joined(first, second)
    assert spoken.tolist() == whole.generate(PROMPT, max_new_tokens=7).tolist()
    expected = whole.generate(joined(spoken, MORE), max_new_tokens=6)
    assert joined(spoken, third, fourth).tolist() == expected.tolist()
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == first.tolist()


def test_padded_texts_go_on_with_the_session_around_them(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=64, batch_size=2):
        first = model.generate(PADDED, attention_mask=MASK, max_new_tokens=4)
        found = joined(first, model.generate(None, max_new_tokens=4))
    assert found.tolist() == whole.generate(PADDED, attention_mask=MASK, max_new_tokens=8).tolist()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"use_cache": True}, {}], ids=["asked for", "by default"])
def test_calls_of_the_model_go_on_with_the_session_around_them(
    model: Any, whole: PreTrainedModel, options: dict[str, bool]
):
    with model.inference_session(max_length=64) as session:
        tokens, said = PROMPT, []
        for _ in range(5):
            tokens = model(tokens, **options).logits[:, -1:].argmax(dim=-1)
            said.append(tokens)
        assert session.position == 9
        alone = model(MORE, use_cache=False).logits
        assert session.position == 9
    torch.testing.assert_close(alone, whole(MORE).logits, rtol=1e-3, atol=1e-4)
    assert joined(PROMPT, *said).tolist() == whole.generate(PROMPT, max_new_tokens=5).tolist()


@torch.no_grad()
def test_calls_of_the_model_and_of_generate_take_turns(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=64):
        model(PROMPT)
        model(MORE)
        text = joined(PROMPT, MORE)
        first = model.generate(None, max_new_tokens=4)
        assert joined(text, first).tolist() == whole.generate(text, max_new_tokens=4).tolist()
        text = joined(text, first)
        then = model(text[:, -1:]).logits[:, -1:].argmax(dim=-1)
        text = joined(text, then)
        assert text.tolist() == whole.generate(joined(PROMPT, MORE), max_new_tokens=5).tolist()
        found = model.generate(then, max_new_tokens=3)
        assert joined(text[:, :-1], found).tolist() == whole.generate(text, max_new_tokens=3).tolist()


@torch.no_grad()
def test_blocks_that_are_called_go_on_with_their_session_and_slices_do_not(model: Any):
    blocks = model.transformer.h
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    whole, of_slice = blocks(hidden), blocks[1:3](hidden)
    with blocks.inference_session(max_length=8) as session:
        parts = [blocks(part) for part in hidden.split(2, dim=1)]
        assert session.position == 6
        torch.testing.assert_close(blocks[1:3](hidden), of_slice)
        assert session.position == 6
    assert_equal(joined(*parts), whole)


def test_generate_does_not_guess_what_was_given_as_hidden_states(model: Any):
    with model.inference_session(max_length=64) as session:
        session.step(torch.randn(1, 3, 32))
        with pytest.raises(UserError, match="has read 3 tokens, of which generate\\(\\) knows 0"):
            model.generate(PROMPT, max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("position", [8, 7, 2, 1, 0])
def test_a_position_is_gone_back_to(model: Any, whole: PreTrainedModel, position: int):
    with model.inference_session(max_length=64) as session:
        assert session.position == 0
        text = model.generate(PROMPT, max_new_tokens=4)
        assert session.position == 8
        session.position = position
        assert session.position == position
        kept = text if position == 8 else text[:, :position]
        text = joined(kept, model.generate(MORE, max_new_tokens=4))
        assert text.tolist() == whole.generate(joined(kept, MORE), max_new_tokens=4).tolist()
        text = joined(text, model.generate(None, max_new_tokens=2))
        assert text.tolist() == whole.generate(joined(kept, MORE), max_new_tokens=6).tolist()


@torch.no_grad()
def test_a_position_is_gone_back_to_between_steps(model: Any, whole: PreTrainedModel):
    blocks = model.transformer.h
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    with blocks.inference_session(max_length=8) as session:
        session.step(hidden[:, :6])
        session.position = 2
        found = session.step(hidden[:, 2:])
        assert session.position == 8
    expected = blocks(hidden)[:, 2:]
    # Rounding is relative to the largest numbers, of which the small ones are differences.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_a_position_may_be_gone_back_to_after_beams(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=64) as session:
        text = model.generate(PROMPT, max_new_tokens=4, num_beams=3)
        assert session.position == 8
        session.position = 6
        found = joined(text[:, :6], model.generate(None, max_new_tokens=4))
    assert found.tolist() == whole.generate(text[:, :6], max_new_tokens=4).tolist()


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_that_was_never_reached_is_refused(model: Any, position: int):
    with model.inference_session(max_length=64) as session:
        model.generate(PROMPT, max_new_tokens=4)
        with pytest.raises(UserError, match=f"a session that has read 8 tokens has no position {position}"):
            session.position = position


def test_a_text_may_be_shortened_as_in_petals(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=64) as session:
        text = model.generate(PROMPT, max_new_tokens=4)
        session.position = 6
        session.output_ids = text[:, :7]
        found = joined(text[:, :7], model.generate(None, max_new_tokens=4))
    assert found.tolist() == whole.generate(text[:, :7], max_new_tokens=4).tolist()


def test_the_innermost_session_of_a_model_is_gone_on_with(model: Any, whole: PreTrainedModel):
    with model.inference_session(max_length=64):
        outer = model.generate(PROMPT, max_new_tokens=2)
        with model.inference_session(max_length=64):
            inner = model.generate(MORE, max_new_tokens=2)
            inner = joined(inner, model.generate(None, max_new_tokens=2))
        outer = joined(outer, model.generate(None, max_new_tokens=2))
    assert inner.tolist() == whole.generate(MORE, max_new_tokens=4).tolist()
    assert outer.tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


def test_sessions_of_two_models_do_not_meet(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4")
    first, second = swarm_.model(), swarm_.model()
    with first.inference_session(max_length=64) as one, second.inference_session(max_length=64) as other:
        first.generate(PROMPT, max_new_tokens=2)
        assert (one.position, other.position) == (6, 0)
        second.generate(MORE, max_new_tokens=2)
        assert (one.position, other.position) == (6, 3)
        found = first.generate(None, max_new_tokens=2)
    assert found.tolist() == whole.generate(PROMPT, max_new_tokens=4)[:, 7:].tolist()


def test_a_session_that_is_named_comes_before_the_one_around(model: Any, whole: PreTrainedModel):
    named = model.inference_session(max_length=64)
    with model.inference_session(max_length=64) as around:
        text = model.generate(PROMPT, max_new_tokens=2, session=named)
        result = model.generate(PROMPT, max_new_tokens=2, use_cache=False)
        assert around.position == 0
        assert text.tolist() == result.tolist() == whole.generate(PROMPT, max_new_tokens=2).tolist()
    with named:
        text = joined(text, model.generate(None, max_new_tokens=2))
    assert text.tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


@pytest.mark.parametrize("options", [{"use_cache": False}, {"past_key_values": object()}])
def test_a_session_and_another_cache_are_refused(model: Any, options: dict[str, Any]):
    with (
        model.inference_session(max_length=64) as session,
        pytest.raises(UserError, match="a session is a cache"),
    ):
        model.generate(PROMPT, max_new_tokens=2, session=session, **options)


class AsksAgain(LogitsProcessor):  # type: ignore[misc]
    """Generates another text, inside of `generate()`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.answers: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.answers.append(self.model.generate(MORE, max_new_tokens=2).tolist())
        return scores


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.5}], ids=["another text", "guidance"])
def test_what_generate_calls_inside_does_not_touch_the_session(
    model: Any, whole: PreTrainedModel, options: dict[str, Any]
):
    asks = AsksAgain(model)
    with model.inference_session(max_length=64):
        text = model.generate(PROMPT, max_new_tokens=4, logits_processor=LogitsProcessorList([asks]), **options)
    assert text.tolist() == whole.generate(PROMPT, max_new_tokens=4, **options).tolist()
    assert asks.answers == [whole.generate(MORE, max_new_tokens=2).tolist()] * 4


def test_another_thread_has_its_own_calls(model: Any, whole: PreTrainedModel):
    answers: dict[str, list[list[int]]] = {}

    def outside() -> None:
        answers["outside"] = model.generate(MORE, max_new_tokens=3).tolist()

    with model.inference_session(max_length=64) as session:
        text = model.generate(PROMPT, max_new_tokens=2)
        thread = threading.Thread(target=outside)
        thread.start()
        thread.join()
        assert session.position == 6
        # One that is started in this context belongs to it.
        inside = contextvars.copy_context()
        thread = threading.Thread(
            target=lambda: answers.update(inside=inside.run(model.generate, None, max_new_tokens=2).tolist())
        )
        thread.start()
        thread.join()
    assert answers["outside"] == whole.generate(MORE, max_new_tokens=3).tolist()
    assert joined(text, torch.tensor(answers["inside"])).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


def test_a_task_that_outlives_the_session_calls_without_it(model: Any, whole: PreTrainedModel):
    async def scene() -> list[list[int]]:
        left = asyncio.Event()

        async def later() -> list[list[int]]:
            await left.wait()
            answer: list[list[int]] = model.generate(PROMPT, max_new_tokens=3).tolist()
            return answer

        with model.inference_session(max_length=64):
            model.generate(MORE, max_new_tokens=2)
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        left.set()
        return await task

    assert asyncio.run(scene()) == whole.generate(PROMPT, max_new_tokens=3).tolist()


def test_a_session_may_be_left_in_another_context_than_it_was_entered_in(model: Any, whole: PreTrainedModel):
    session = model.inference_session(max_length=64)
    contextvars.copy_context().run(session.__enter__)
    assert model.generate(PROMPT, max_new_tokens=2).tolist() == whole.generate(PROMPT, max_new_tokens=2).tolist()
    assert session.position == 0
    session.__exit__(None, None, None)
    with pytest.raises(UserError, match="closed"):
        model.generate(PROMPT, max_new_tokens=2, session=session)
