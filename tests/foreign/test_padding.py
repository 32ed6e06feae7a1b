"""Attention masks: padding before a text, after it and in it, in single passes, in sessions and while decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal import UserError
from shoal.model.remote_cache import RemoteCache
from tests.swarm.visitors import sees_text

from .pair import HOLES, LEFT, MASKS, NEVER, RIGHT, TEXTS, Pair, assert_close, assert_same_generation

PADDED = [name for name in MASKS if name != "no padding"]


def positions_of(mask_BT: Tensor) -> Tensor:
    """As `generate` counts them."""
    return (mask_BT.cumsum(dim=-1) - 1).masked_fill(mask_BT == 0, 0)


@pytest.mark.parametrize("mask", PADDED)
@pytest.mark.parametrize("positions", ["counted", "as in generate"])
@torch.no_grad()
def test_a_pass_gives_the_logits_of_transformers_wherever_they_are_defined(pair: Pair, mask: str, positions: str):
    inputs = pair.inputs(mask)
    if positions == "as in generate" and pair.family != "bloom":
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
    logits = pair.model(**inputs, use_cache=False).logits
    defined = sees_text(inputs["attention_mask"])
    assert_close(logits[defined], pair.whole(**inputs).logits[defined])
    assert logits.isfinite().all()


@pytest.mark.parametrize("mask", PADDED)
@torch.no_grad()
def test_a_session_gives_the_logits_of_transformers_wherever_they_are_defined(pair: Pair, mask: str):
    inputs = pair.inputs(mask)
    defined = sees_text(inputs["attention_mask"])
    expected = pair.whole(**inputs).logits
    with pair.model.inference_session(max_length=32, batch_size=3) as session:
        cache = RemoteCache(session)
        parts = []
        for start, end in ((0, 4), (4, 5), (5, 9)):
            part = {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": inputs["attention_mask"][:, :end]}
            if pair.family != "bloom":  # Transformers' own count, which does not know of the padding
                part["position_ids"] = torch.arange(start, end)[None]
            parts.append(pair.model(**part, past_key_values=cache).logits)
    logits = torch.cat(parts, dim=1)
    assert_close(logits[defined], expected[defined])
    assert logits.isfinite().all()


@pytest.mark.parametrize("mask", PADDED)
def test_decoding_after_padding_gives_the_tokens_and_logits_of_transformers(pair: Pair, mask: str):
    actual, expected = pair.generate(**pair.inputs(mask), output_logits=True)
    assert_same_generation(actual, expected)


@pytest.mark.parametrize("mask", PADDED)
def test_beams_after_padding_are_those_of_transformers(pair: Pair, mask: str):
    actual, expected = pair.generate(**pair.inputs(mask), num_beams=3, num_return_sequences=2, output_scores=True)
    assert_same_generation(actual, expected)


def test_padding_on_the_left_changes_nothing(pair: Pair):
    for row in (1, 2):
        alone = TEXTS[row : row + 1, LEFT[row].bool()]
        padded, _ = pair.generate(input_ids=TEXTS * LEFT, attention_mask=LEFT)
        single, _ = pair.generate(input_ids=alone)
        assert padded.sequences[row, TEXTS.shape[1] :].tolist() == single.sequences[0, alone.shape[1] :].tolist()


@pytest.mark.parametrize("mask", [RIGHT, HOLES], ids=["right", "holes"])
def test_gradients_of_padded_texts_are_those_of_transformers(pair: Pair, mask: Tensor):
    found = []
    labels = TEXTS.masked_fill(mask == 0, -100)
    for model in (pair.model, pair.whole):
        embeds = pair.whole.get_input_embeddings()(TEXTS).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), embeds.grad))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@torch.no_grad()
def test_a_mask_that_hides_nothing_is_a_mask_all_the_same(pair: Pair):
    """Without one, Transformers takes positions that begin anew for another text in the same row."""
    positions = {} if pair.family == "bloom" else {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    for mask in ({}, {"attention_mask": torch.ones_like(TEXTS)}):
        actual, expected = (
            each(TEXTS, **positions, **mask, use_cache=False).logits for each in (pair.model, pair.whole)
        )
        assert_close(actual, expected)


def test_a_server_that_is_lost_after_padding_leaves_no_trace(pair: Pair):
    pair.swarm.start("2:5")
    inputs = pair.inputs("holes")
    expected = pair.whole.generate(**inputs, max_new_tokens=12, eos_token_id=NEVER)
    with pair.model.inference_session(max_length=32, batch_size=3) as session:

        def kill_at_the_sixth(ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
            if ids_BT.shape[1] == TEXTS.shape[1] + 5:
                pair.swarm.kill(session.servers[-1])
            return scores_BV

        options = {"max_new_tokens": 12, "eos_token_id": NEVER, "logits_processor": [kill_at_the_sixth]}
        assert pair.model.generate(**inputs, **options, session=session).tolist() == expected.tolist()


@torch.no_grad()
def test_a_mask_that_contradicts_what_a_session_was_told_is_refused(pair: Pair):
    inputs = pair.inputs("padding on the left")
    with pair.model.inference_session(max_length=32, batch_size=3) as session:
        cache = RemoteCache(session)
        pair.model(**inputs, past_key_values=cache)
        for mask in (None, torch.ones(3, 10)):
            with pytest.raises(
                UserError, match="differs from the earlier one for tokens that the session has read"
            ) as caught:
                pair.model(TEXTS[:, :1], attention_mask=mask, past_key_values=cache)
            assert "pass the mask of all tokens" in caught.value.hint
        mask = torch.cat((LEFT, LEFT.new_ones(3, 1)), dim=1)
        assert pair.model(TEXTS[:, :1], attention_mask=mask, past_key_values=cache).logits.isfinite().all()
