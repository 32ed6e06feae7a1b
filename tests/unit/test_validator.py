"""What a server computes, and what it refuses before anything is computed."""

from __future__ import annotations

import pytest
import torch

from shoal.protocol import MAX_FACTORS, MAX_LENGTH, MAX_PASS_TOKENS
from shoal.server.engine.validator import RequestValidator
from shoal.server.refusals import Refused
from shoal.server.step_inputs import Tensors
from shoal.spans import Span

VALIDATOR = RequestValidator(model="", fingerprint="", span=Span(0, 1), hidden_size=1, max_length=MAX_LENGTH)


def sequence_of(num_tokens: int) -> Tensors:
    return {"hidden": torch.zeros(1, num_tokens, 1)}


def test_a_sequence_whose_attention_would_fill_the_memory_is_refused():
    """Whatever the model and a payload allow: masks and scores have the square of its tokens."""
    VALIDATOR.pass_inputs(sequence_of(MAX_PASS_TOKENS))
    with pytest.raises(Refused, match="16385 tokens in one pass; 16384 are allowed") as refusal:
        VALIDATOR.pass_inputs(sequence_of(MAX_PASS_TOKENS + 1))
    assert refusal.value.failure.code == "rejected"


def test_more_tensors_of_factors_than_an_answer_can_name_are_refused():
    VALIDATOR.check_factors(MAX_FACTORS)
    with pytest.raises(Refused, match="200001 tensors of factors in one span; 200000 are allowed"):
        VALIDATOR.check_factors(MAX_FACTORS + 1)
