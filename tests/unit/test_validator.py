"""What a server computes, and what it refuses before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.net.wire import codec
from shoal.net.wire.frames import pack_prefix
from shoal.protocol import (
    MAX_FACTORS,
    MAX_LENGTH,
    MAX_PASS_TOKENS,
    REQUEST_KINDS,
    AnyMessage,
    Backward,
    Forward,
    Open,
    PassInputs,
    Step,
    dump,
)
from shoal.server.engine.validator import RequestValidator
from shoal.server.refusals import Refused
from shoal.server.step_inputs import Tensors
from shoal.spans import Span
from shoal.tensors import TensorSpec

from .test_libp2p_stream import Wire

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


def declaring(kind: str, *tensors: tuple[str, str, tuple[int, ...]], **fields: Any) -> AnyMessage:
    specs = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in tensors)  # type: ignore[arg-type]
    makers: dict[str, Callable[..., AnyMessage]] = {
        "step": Step,
        "forward": Forward,
        "backward": Backward,
        "open": Open,
        "pass_inputs": PassInputs,
    }
    if kind not in ("step", "pass_inputs"):
        fields = {"model": "m", "fingerprint": "f", "start": 0, "end": 1, **fields}
    return makers[kind](tensors=specs, **fields)


SMALL = replace(VALIDATOR, hidden_size=64, max_length=4096)


@pytest.mark.parametrize(
    "message",
    [
        declaring("step", ("hidden", "float32", (1, 1024, 64)), position=0),
        declaring("step", ("hidden", "float32", (1024, 1, 64)), ("mask", "uint8", (1024, 1)), position=0),
        declaring(
            "step", ("hidden", "float32", (1, 1024, 64)), ("positions", "int64", (1, 1024)), position=0, link="0" * 32
        ),
        declaring("forward", ("hidden", "float32", (1, 4096, 64)), ("positions", "int64", (1, 4096))),
        declaring("backward", ("grad", "float32", (1, 4096, 64)), kept="0" * 32),
        declaring("open", ("digests", "uint8", (2, 256, 16)), batch_size=2, expected_length=4096),
        declaring("pass_inputs", ("hidden", "bfloat16", (1, 2048, 4096)), link="0" * 32),
    ],
    ids=lambda message: message.kind,
)
def test_what_a_request_may_have_is_received(message: AnyMessage) -> None:
    SMALL.check_declared(message)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (declaring("step", ("hidden", "float32", (1, 1025, 64)), position=0), "1025 tokens in one step"),
        (declaring("step", ("hidden", "float32", (1, 1, 1 << 20)), position=0), "hidden size 1048576"),
        (declaring("step", ("hidden", "float32", (1 << 20,)), position=0), "must be floating-point numbers of shape"),
        (declaring("step", ("positions", "int64", (1, 1 << 20)), position=0), "1048576 positions"),
        (
            declaring("step", ("hidden", "float32", (1, 1, 1 << 20)), position=0, link="0" * 32),
            "a push of 4194304 bytes",
        ),
        (declaring("pass_inputs", ("hidden", "bfloat16", (1, 2049, 4096)), link="0" * 32), "a push of 16785408 bytes"),
        (declaring("forward", ("hidden", "float32", (1, 4097, 64))), "the model allows 4096"),
        (declaring("forward", ("hidden", "float32", (8, 1024, 64))), "8192 tokens in one batch"),
        (declaring("backward", ("grad", "float32", (1, 1 << 18, 64)), kept="0" * 32), "the model allows 4096"),
        (declaring("open", ("digests", "uint8", (2, 257, 16)), batch_size=2, expected_length=4096), "257 pages"),
    ],
)
@pytest.mark.anyio
async def test_a_frame_that_would_be_refused_anyhow_is_refused_by_its_header(message: AnyMessage, reason: str) -> None:
    wire = Wire()
    header = dump(message)
    wire.deliver(pack_prefix(len(header), message.payload_bytes) + header + bytes(1000))
    with pytest.raises(Refused) as refused:
        await codec.receive(wire.stream, REQUEST_KINDS, SMALL.check_declared)
    assert reason in refused.value.failure.reason
    assert wire.num_unread == 1000
