"""No request makes a gateway fail: whatever it is sent, it answers, or refuses with the reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shoal.bundled import STORIES
from shoal.gateway.app import Gateway, application
from shoal.gateway.guard.admission import Admission
from shoal.gateway.served_model import ServedModel

from .gateways import served_at
from .harness import QUICK, swarm_of

MODEL = "tiny"
TEXT = "Once upon a time"
TOOL: Any = {"name": "go", "parameters": {"type": "object", "properties": {"to": {"enum": ["Rome", "Oslo"]}}}}
MESSAGES: Any = [{"role": "system", "content": TEXT}, {"role": "user", "content": [{"type": "text", "text": "there"}]}]
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "n": 2,
        "seed": 1,
        "stop": ["x", "end"],
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1.5},
        "presence_penalty": 0.5,
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "required",
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {
        "model": MODEL,
        "prompt": [TEXT, "there was"],
        "max_tokens": 4,
        "echo": True,
        "logprobs": 3,
        "structured_outputs": {"regex": "[ab]+", "json": None},
    },
    "/v1/responses": {
        "model": MODEL,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": TEXT}]},
            {"type": "function_call", "call_id": "c", "name": "go", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "gone"},
        ],
        "max_output_tokens": 4,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": TOOL["parameters"]}},
        "stream": True,
    },
    "/v1/messages": {
        "model": MODEL,
        "max_tokens": 4,
        "system": [{"type": "text", "text": TEXT}],
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "go", "input": {"to": "Rome"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "gone"}]},
        ],
        "tools": [{"name": "go", "input_schema": TOOL["parameters"]}],
        "tool_choice": {"type": "tool", "name": "go"},
        "stop_sequences": ["x"],
    },
    "/v1/embeddings": {"model": MODEL, "input": [TEXT, "there"], "encoding_format": "base64"},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that serves a tiny model, with texts of at most 40 tokens, by every name."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder: Path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)

    class AnyName(Gateway):
        def model(self, name: str) -> ServedModel:
            return self.models[MODEL]

    with swarm_of(folder, "0:2") as net:
        patient = replace(QUICK, silence_seconds=60.0, patience_seconds=60.0)  # a busy machine is not a lost server
        served = ServedModel(MODEL, net.model(config=patient), tokenizer)
        with served_at(application(AnyName([served], Admission()))) as url:
            yield url


@pytest.fixture(scope="module")
def api(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_no_body_that_the_schema_allows_makes_it_fail(api: Any, path: str, data: st.DataObject):
    case = data.draw(api[path]["POST"].as_strategy())
    answer = case.call(timeout=60)
    case.validate_response(answer, checks=[not_a_server_error])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([TEXT, MODEL]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside a JSON value."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [path] * bool(path) + [each for key, below in inner for each in places(below, (*path, key))]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """A request that is right but for one or two values, which are gone or others."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body = copy.deepcopy(BODIES[path])
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(st.sampled_from(places(body)))
        inside = body
        for key in above:
            inside = inside[key]
        if draw(st.booleans()):
            inside[last] = draw(JSON)
        else:
            del inside[last]
    return path, body


@given(mutated())
@settings(max_examples=120, deadline=None)
def test_no_body_that_is_almost_right_makes_it_fail(url: str, request_: tuple[str, Any]):
    path, body = request_
    answer = httpx.post(
        f"{url}{path}", content=json.dumps(body).encode(), headers={"content-type": "application/json"}, timeout=60
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif "text/event-stream" in answer.headers["content-type"]:
        assert "internal_error" not in answer.text
        assert "api_error" not in answer.text


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_that_are_mutated_are_right(url: str, path: str):
    body = {name: value for name, value in BODIES[path].items() if value is not None}
    answer = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
