"""What PETALS' tests ask of remote blocks: each by itself and in a row, forward, backward and in sessions."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import shoal
from shoal import UserError
from shoal.model.body import Body
from shoal.spans import Span
from tests.swarm.harness import swarm_of
from tests.swarm.parity import assert_equal
from tests.swarm.tiny_models import NUM_BLOCKS, tiny_config, tiny_model
from tests.swarm.visitors import random_inputs, tiny_body

from .pair import NEVER, TEXTS, Pair

SPANS = ["0:1", "2:3", "4:5", "1:4", "0:5"]
STEPS = {"one by one": [1] * 8, "all at once": [8], "of many lengths": [3, 1, 2, 1, 1]}


def local(pair: Pair) -> Body:
    """The same blocks, here."""
    return tiny_body(pair.family)


def inputs_of(pair: Pair, batch_size: int = 1, num_tokens: int = 8, *, seed: int = 1) -> Tensor:
    return random_inputs(seed, local(pair), batch_size, num_tokens)


@pytest.mark.parametrize("text", SPANS)
def test_blocks_compute_and_differentiate_as_they_do_here(pair: Pair, text: str):
    span = Span.parse(text)
    weights = inputs_of(pair, 2, 6, seed=2)
    found = []
    for blocks in (pair.model.transformer.h[span.start : span.end], lambda hidden: local(pair)(hidden, span=span)):
        hidden = inputs_of(pair, 2, 6).requires_grad_()
        output = blocks(hidden)
        (output * weights).sum().backward()
        found.append((output.detach(), hidden.grad))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("middle", [1, 2, 4])
def test_two_halves_are_the_whole(pair: Pair, middle: int):
    blocks = pair.model.transformer.h
    first, second = blocks[:middle], blocks[middle:]
    assert (len(first), len(second), len(blocks)) == (middle, NUM_BLOCKS - middle, NUM_BLOCKS)
    found = []
    for call in (blocks, lambda hidden: second(first(hidden))):
        hidden = inputs_of(pair).requires_grad_()
        output = call(hidden)
        assert output.requires_grad
        output.square().sum().backward()
        found.append((output.detach(), hidden.grad))
    for whole, halves in zip(*found, strict=True):
        assert_equal(halves, whole)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("text", ["2:3", "1:4", "0:5"])
def test_a_session_that_is_stepped_through_is_the_pass(pair: Pair, text: str, steps: str):
    span = Span.parse(text)
    hidden = inputs_of(pair, 2)
    with pair.model.transformer.h[span.start : span.end].inference_session(max_length=8, batch_size=2) as session:
        parts = [session.step(part) for part in hidden.split(STEPS[steps], dim=1)]
    assert_equal(torch.cat(parts, dim=1), local(pair)(hidden, span=span))


def test_sessions_in_a_row_are_the_blocks_in_a_row(pair: Pair):
    hidden, blocks = inputs_of(pair), pair.model.transformer.h
    with blocks[:2].inference_session(max_length=8) as first, blocks[2:].inference_session(max_length=8) as second:
        parts = [second.step(first.step(part)) for part in hidden.split([2, 1, 1, 4], dim=1)]
    assert_equal(torch.cat(parts, dim=1), local(pair)(hidden))


def test_sessions_that_take_turns_do_not_notice_each_other(pair: Pair):
    texts = [inputs_of(pair, seed=seed) for seed in (1, 2)]
    blocks = pair.model.transformer.h
    with blocks.inference_session(max_length=8) as first, blocks.inference_session(max_length=8) as second:
        pieces = [
            [session.step(part) for session, part in zip((first, second), parts, strict=True)]
            for parts in zip(*(text.split([3, 1, 4], dim=1) for text in texts), strict=True)
        ]
    for outputs, text in zip(zip(*pieces, strict=True), texts, strict=True):
        assert_equal(torch.cat(outputs, dim=1), local(pair)(text))


def test_a_session_takes_no_more_than_its_length(pair: Pair):
    hidden = inputs_of(pair, num_tokens=9)
    with pair.model.transformer.h[2:3].inference_session(max_length=8) as session:
        session.step(hidden[:, :7])
        with pytest.raises(ValueError, match="9 tokens in a session of at most 8"):
            session.step(hidden[:, 7:])
        last = session.step(hidden[:, 7:8])
    assert_equal(last, local(pair)(hidden[:, :8], span=Span(2, 3))[:, 7:])


@pytest.mark.parametrize("back_to", [0, 2, 5, 8])
def test_a_session_that_goes_back_forgets_what_it_read(pair: Pair, back_to: int):
    first, second = (inputs_of(pair, seed=seed) for seed in (1, 2))
    edited = torch.cat((first[:, :back_to], second[:, back_to:], second[:, :1]), dim=1)
    with pair.model.transformer.h.inference_session(max_length=16) as session:
        before = session.step(first)
        session.crop(back_to)
        after = session.step(edited[:, back_to:])
    assert_equal(torch.cat((before[:, :back_to], after), dim=1), local(pair)(edited))


def test_a_closed_session_says_so(pair: Pair):
    with pair.model.transformer.h.inference_session(max_length=8) as session:
        session.step(inputs_of(pair))
    with pytest.raises(UserError, match="this session is closed"):
        session.step(inputs_of(pair))


@torch.no_grad()
def test_embeddings_blocks_and_head_by_hand_are_the_model(pair: Pair):
    """As in PETALS: the backbone's parts around a session that is given one token after another."""
    parallel = pair.model(TEXTS[:1], use_cache=False).logits
    backbone = pair.model.base_model
    norm = backbone.ln_f if pair.family == "bloom" else backbone.norm
    embeds = pair.model.get_input_embeddings()(TEXTS[:1])
    if pair.family == "bloom":
        embeds = backbone.word_embeddings_layernorm(embeds)
    with pair.model.transformer.h.inference_session(max_length=9) as session:
        hidden = torch.cat([session.step(token) for token in embeds.split(1, dim=1)], dim=1)
    recurrent = pair.model.get_output_embeddings()(norm(hidden))
    assert_equal(recurrent, parallel)
    assert_equal(parallel, pair.whole(TEXTS[:1]).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_servers_compute_as_precisely_as_they_were_told(family: str, tmp_path: Path):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    body = tiny_body(family)
    hidden = random_inputs(1, body, 2, 8)
    expected = body(hidden)
    with swarm_of(tmp_path, "0:5", dtype="bfloat16") as swarm:
        blocks = swarm.model().transformer.h
        output = blocks(hidden)
        with blocks.inference_session(max_length=8, batch_size=2) as session:
            stepped = session.step(hidden)
    for found in (output, stepped):
        assert found.dtype == torch.float32
        error = (found - expected).norm() / expected.norm()
        assert 1e-6 < error < 0.02, "neither float32 nor near it"


def test_the_blocks_bear_the_name_that_petals_gave_them(pair: Pair):
    assert isinstance(pair.model.transformer.h, shoal.RemoteSequential)
    assert isinstance(pair.model.transformer.h[1:3], shoal.RemoteSequential)
    assert torch.equal(pair.model.transformer.word_embeddings(TEXTS), pair.model.get_input_embeddings()(TEXTS))


def test_a_position_that_is_set_takes_tokens_back(pair: Pair):
    first, second = (inputs_of(pair, seed=seed) for seed in (1, 2))
    edited = torch.cat((first[:, :2], second[:, 2:]), dim=1)
    with pair.model.transformer.h.inference_session(max_length=8) as session:
        before = session.step(first)
        assert session.position == 8
        session.position = 2
        after = session.step(edited[:, 2:])
        assert session.position == 8
    assert_equal(torch.cat((before[:, :2], after), dim=1), local(pair)(edited))


def test_a_step_of_no_tokens_changes_nothing(pair: Pair):
    hidden = inputs_of(pair)
    with pair.model.transformer.h.inference_session(max_length=8) as session:
        parts = [session.step(hidden[:, :4]), session.step(hidden[:, :0]), session.step(hidden[:, 4:])]
    assert parts[1].shape == (1, 0, hidden.shape[2])
    assert_equal(torch.cat(parts, dim=1), local(pair)(hidden))


def test_calls_inside_a_session_go_on_with_it(pair: Pair):
    expected = pair.whole.generate(TEXTS[:1], max_new_tokens=8, eos_token_id=NEVER)
    with pair.model.inference_session(max_length=32) as session:
        first = pair.model.generate(TEXTS[:1], max_new_tokens=4, eos_token_id=NEVER)
        rest = pair.model.generate(None, max_new_tokens=4, eos_token_id=NEVER)
        assert session.position == TEXTS.shape[1] + 7
    assert torch.cat((first, rest), dim=1).tolist() == expected.tolist()
