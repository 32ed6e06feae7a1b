"""What a gateway refuses, limits, counts and logs of requests, and how it answers what fails."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from shoal.bundled import STORIES
from shoal.gateway.app import Gateway, application
from shoal.gateway.endpoints.turns import Turn
from shoal.gateway.guard.admission import Admission
from shoal.gateway.served_model import ServedModel
from shoal.prefix import PAGE_TOKENS

from ..gateways import served_at
from ..harness import QUICK, Swarm, swarm_of
from ..test_adapters import adapted
from .asked import MESSAGES, PROMPT, TOOLS, Expected


def test_the_page_and_what_it_is_told(url: str, net: Swarm):
    for name in ("", "app.js", "api.js", "chat.js", "swarm.js", "style.css", "icon.svg"):
        answer = httpx.get(f"{url}/{name}")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    for name in ("../app.py", "%2e%2e/app.py", "nothing.js"):
        assert httpx.get(f"{url}/{name}").status_code == 404
    with httpx.stream("GET", f"{url}/api/swarm", params={"model": "stories"}) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
    found = json.loads(line.removeprefix("data: "))
    assert found["type"] == "swarm"
    assert [(each["start"], each["end"], each["state"]) for each in found["servers"]] == [
        (0, 6, "online"),
        (6, 12, "online"),
    ]
    assert found["missing"] == []
    assert httpx.get(f"{url}/api/swarm", params={"model": "other"}).status_code == 404


def test_what_is_counted(client: openai.OpenAI, url: str):
    client.completions.create(model="stories", prompt=PROMPT, max_tokens=3)
    text = httpx.get(f"{url}/metrics").text
    assert 'shoal_requests_total{endpoint="/v1/completions",status="200"}' in text
    assert 'shoal_tokens_total{kind="generated",model="stories"}' in text
    assert "shoal_requests_running 0.0" in text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logit_bias": {"5": 1000}}, "logit_bias.5"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"regex": "(["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json"),
        ({"tools": TOOLS}, "tools"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"max_tokens": 100_000}, "max_tokens"),
    ],
)
def test_a_bad_field_is_named(url: str, change: dict[str, Any], param: str):
    body = {"model": "stories", "messages": MESSAGES, "max_tokens": 4} | change
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        ({"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0", "prompt.0"),
        ({"prompt": [[]]}, "prompt.0: List should have at least 1 item", "prompt.0"),
        ({"prompt": []}, "prompt: List should have at least 1 item", "prompt"),
        ({"prompt": {"text": "a"}}, "prompt: Input should be a valid string", "prompt"),
        ({"stop": [""]}, "stop.0: String should have at least 1 character", "stop.0"),
        ({"logit_bias": {"99999": 10}}, "the model stories has tokens 0 to 1023", "logit_bias"),
        ({"TopK": 1}, "TopK: Extra inputs are not permitted", "TopK"),
    ],
)
def test_a_bad_field_is_told_in_plain_words(url: str, change: dict[str, Any], message: str, param: str):
    answer = httpx.post(f"{url}/v1/completions", json={"model": "stories", "prompt": PROMPT, "max_tokens": 1} | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        ('{"model": "stories", "prompt": }', {"Content-Type": "application/json"}, "the body is not JSON"),
        (
            '{"model": "stories"}',
            {"Content-Type": "application/x-www-form-urlencoded"},
            "the body has to be JSON",
        ),
        ("[]", {"Content-Type": "application/json"}, "Input should be"),
    ],
)
def test_a_body_that_is_no_object_is_told_in_plain_words(url: str, content: str, headers: dict[str, str], message: str):
    answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] is None


def test_offsets_are_places_in_the_text(client: openai.OpenAI):
    """Also of an echo, whose mark of the beginning is in the text only if the prompt has it."""
    marked = client.completions.create(model="stories", prompt=[0, 442, 443], max_tokens=3, echo=True, logprobs=0)
    plain = client.completions.create(model="stories", prompt=PROMPT, max_tokens=3, echo=True, logprobs=0)
    for choice in (*marked.choices, *plain.choices):
        assert choice.logprobs is not None
        pieces, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
        assert pieces is not None
        assert offsets is not None
        shown = [choice.text[start:end] for start, end in pairwise([*offsets, len(choice.text)])]
        assert "".join(shown) == choice.text
        assert all(text in (piece, "") for text, piece in zip(shown, pieces, strict=True))


@pytest.mark.parametrize(("num_prompts", "n"), [(64, 16), (9, 15), (64, 3)])
def test_a_request_for_too_many_texts_is_refused(url: str, num_prompts: int, n: int):
    body = {"model": "stories", "prompt": [PROMPT] * num_prompts, "n": n, "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt"
    assert "more than 128 texts" in error["message"]


def test_a_request_with_more_texts_than_may_run_is_answered_in_turns(net: Swarm, tokenizer: Any):
    served = ServedModel("stories", net.model(), tokenizer)
    ask: dict[str, Any] = {"model": "stories", "prompt": [PROMPT, "A hen"], "n": 3, "max_tokens": 4, "seed": 1}
    texts = []
    for max_running in (1, 64):
        with served_at(application(Gateway([served], Admission(max_running=max_running)))) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            texts.append([choice.text for choice in client.completions.create(**ask).choices])
            chunks = client.completions.create(stream=True, **ask)
            assert {chunk.choices[0].index for chunk in chunks} == set(range(6))
    assert len(texts[0]) == 6
    assert texts[0] == texts[1]


def test_what_is_not_there_is_an_error_object(url: str):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)]:
        answer = httpx.request(method, f"{url}{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    answer = httpx.post(f"{url}/v1/completions", content=b"{" * 10, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "other", "messages": MESSAGES})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    huge = httpx.post(f"{url}/v1/completions", content=b"x" * (17 << 20))
    assert huge.status_code == 413


def test_a_client_that_goes_away_costs_nothing_more(url: str, net: Swarm):
    free = [server.engine.cache_tokens_left for server in net.servers.values()]
    body = {"model": "stories", "prompt": PROMPT, "max_tokens": 200, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    net.settle(lambda: [server.engine.cache_tokens_left for server in net.servers.values()] == free)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body | {"stream": False}, timeout=0.2)
    net.settle(lambda: [server.engine.cache_tokens_left for server in net.servers.values()] == free)


def test_a_gateway_on_loopback_answers_to_its_own_names_only(net: Swarm, tokenizer: Any):
    served = ServedModel("stories", net.model(), tokenizer)
    with served_at(application(Gateway([served], Admission()), hosts=("localhost", "127.0.0.1", "::1"))) as url:
        for host, status in [("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200), ("evil.example", 421)]:
            answer = httpx.get(f"{url}/v1/models", headers={"Host": host})
            assert answer.status_code == status
    with served_at(application(Gateway([served], Admission()), origins=["https://chat.example"])) as url:
        for origin, allowed in [("https://chat.example", "https://chat.example"), ("https://evil.example", None)]:
            answer = httpx.get(f"{url}/v1/models", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
    plain = {"content-type": "text/plain"}  # what a form on another site may send without being asked
    with served_at(application(Gateway([served], Admission()))) as url:
        body = json.dumps({"model": "stories", "prompt": PROMPT})
        assert httpx.post(f"{url}/v1/completions", content=body, headers=plain).status_code == 400


def test_tokens_and_texts_for_an_adapter_of_the_embeddings(
    net: Swarm, stories: PreTrainedModel, tokenizer: Any, tmp_path: Path
):
    config = LoraConfig(r=2, target_modules=["o_proj", "embed_tokens"], task_type="CAUSAL_LM")
    theirs = adapted(copy.deepcopy(stories), config)
    theirs.save_pretrained(tmp_path)
    ids_1S = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = theirs.generate(input_ids=ids_1S, max_new_tokens=6, do_sample=False)
    with closing(net.model().with_adapter(tmp_path)) as model:
        served = ServedModel("stories:theirs", model, tokenizer)
        with served_at(application(Gateway([served], Admission()))) as url:
            ask = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).completions.create
            for prompt in (PROMPT, ids_1S[0].tolist()):
                answer = ask(model="stories:theirs", prompt=prompt, max_tokens=6, temperature=0)
                assert answer.choices[0].text == tokenizer.decode(whole[0, ids_1S.shape[1] :])
            with pytest.raises(openai.BadRequestError, match="has tokens 0 to"):
                ask(model="stories:theirs", prompt=[len(tokenizer)], max_tokens=1)


def test_keys_and_limits(net: Swarm, tokenizer: Any):
    served = ServedModel("stories", net.model(), tokenizer)
    clock = [0.0]
    admission = Admission(["one", "two"], requests_per_minute=2, tokens_per_minute=1000, clock=lambda: clock[0])
    ask: dict[str, Any] = {"model": "stories", "prompt": PROMPT, "max_tokens": 1}
    with served_at(application(Gateway([served], admission))) as url:
        one, two, other = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("one", "two", "three")
        )
        with pytest.raises(openai.AuthenticationError, match="not known"):
            other.completions.create(**ask)
        one.completions.create(**ask)
        one.completions.create(**ask)
        with pytest.raises(openai.RateLimitError) as refused:
            one.completions.create(**ask)
        assert refused.value.response.headers["retry-after"] == "30"
        two.completions.create(**ask)
        clock[0] = 31.0
        one.completions.create(**ask)


def test_a_key_learns_nothing_of_the_prompts_of_another(net: Swarm, tokenizer: Any):
    served = ServedModel("stories", net.model(), tokenizer)
    ask: dict[str, Any] = {"model": "stories", "prompt": "A hen and a goat met at the old well. " * 4, "max_tokens": 1}
    cached = []
    with served_at(application(Gateway([served], Admission(["one", "two"])))) as url:
        for key in ("one", "two", "one", "two"):
            answer = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).completions.create(**ask)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    num_pages = answer.usage.prompt_tokens // PAGE_TOKENS
    assert cached == [0, 0, num_pages * PAGE_TOKENS, num_pages * PAGE_TOKENS]


def test_missing_blocks_are_a_503(net: Swarm, tokenizer: Any):
    with swarm_of(STORIES, "0:6", "6:12") as small:
        model = small.model(config=replace(QUICK, patience_seconds=0.0))
        served = ServedModel("stories", model, tokenizer)
        with served_at(application(Gateway([served], Admission()))) as url:
            assert httpx.get(f"{url}/health").json() == {"status": "ok", "missing": {}}
            small.kill("s1")
            small.stop("s1")
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.InternalServerError, match="no server") as refused:
                client.completions.create(model="stories", prompt=PROMPT)
            assert refused.value.status_code == 503
            for stream in (client.chat.completions, client.responses):
                ask: Any = {"messages": MESSAGES} if stream is client.chat.completions else {"input": MESSAGES}
                with pytest.raises(openai.InternalServerError, match="no server"):
                    stream.create(model="stories", stream=True, **ask)
            assert refused.value.response.headers["retry-after"]
            health = httpx.get(f"{url}/health")
            assert health.status_code == 503
            assert health.json()["missing"] == {"stories": list(range(6, 12))}


def test_a_server_that_is_killed_is_invisible(tokenizer: Any, expected: Expected):
    with swarm_of(STORIES, "0:6", "6:12", "6:12") as net:
        model = net.model()
        served = ServedModel("stories", model, tokenizer)
        with served_at(application(Gateway([served], Admission()))) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            text = ""
            for number, chunk in enumerate(
                client.completions.create(model="stories", prompt=PROMPT, max_tokens=40, temperature=0, stream=True)
            ):
                text += chunk.choices[0].text
                if number == 5:
                    (session,) = model.blocks.runtime.sessions
                    net.kill(session.hops[-1].server.peer)
        assert text == expected(num_tokens=40)


def test_a_request_that_fails_leaves_its_connection_usable(net: Swarm, tokenizer: Any):
    """An error that reached the HTTP server would end the connection after the answer; the transport would raise it."""

    class Broken(ServedModel):
        async def missing_blocks(self) -> list[int]:
            raise RuntimeError("nobody knows")

    async def ask(served: ServedModel, method: str, path: str, **request: Any) -> httpx.Response:
        app = application(Gateway([served], Admission()))
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, **request)

    failed = asyncio.run(ask(Broken("stories", net.model(), tokenizer), "GET", "/health"))
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "internal_error"

    with swarm_of(STORIES, "0:6") as half:
        model = half.model(config=replace(QUICK, patience_seconds=0.0))
        for stream in (True, False):
            body = {"model": "stories", "prompt": PROMPT, "stream": stream}
            refused = asyncio.run(ask(ServedModel("stories", model, tokenizer), "POST", "/v1/completions", json=body))
            assert refused.status_code == 503
            assert "no server" in refused.json()["error"]["message"]


def answer_to(app: Any, *parts: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> tuple[int, dict[str, Any], int]:
    """The status and the body of an answer to a completion whose body stops in the middle, and the parts it read."""
    sent: list[Any] = []
    num_read = 0

    async def receive() -> Any:
        nonlocal num_read
        if num_read == len(parts):
            await asyncio.Event().wait()
        num_read += 1
        return {"type": "http.request", "body": parts[num_read - 1], "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"content-type", b"application/json"), *headers]
    asyncio.run(app(scope, receive, send))
    body = b"".join(message["body"] for message in sent if message["type"] == "http.response.body")
    return sent[0]["status"], json.loads(body)["error"], num_read


def test_a_large_body_of_unknown_length_is_refused(net: Swarm, tokenizer: Any):
    app = application(Gateway([ServedModel("stories", net.model(), tokenizer)], Admission()))
    status, error, num_read = answer_to(app, *[b"x" * (1 << 20)] * 40)
    assert (status, num_read) == (413, 17)
    assert error["message"] == "the body is larger than 16 MiB"


def test_a_body_that_stops_coming_is_refused(net: Swarm, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shoal.gateway.guard.middleware.BODY_SECONDS", 0.01)
    app = application(Gateway([ServedModel("stories", net.model(), tokenizer)], Admission()))
    status, error, _ = answer_to(app, b'{"model": "stories"')
    assert status == 408
    assert "nothing more of the body came" in error["message"]


def test_a_key_is_checked_before_the_body_is_read(net: Swarm, tokenizer: Any):
    app = application(Gateway([ServedModel("stories", net.model(), tokenizer)], Admission(["right"])))
    status, error, num_read = answer_to(app, b"{}", headers=[(b"authorization", b"Bearer wrong")])
    assert (status, num_read) == (401, 0)
    assert error["code"] == "invalid_api_key"


def test_connections_without_requests_are_closed(net: Swarm, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shoal.gateway.guard.connections.HEAD_SECONDS", 0.05)
    monkeypatch.setattr("shoal.gateway.guard.connections.MAX_CONNECTIONS", 2)
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    with served_at(application(Gateway([ServedModel("stories", net.model(), tokenizer)], Admission()))) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        place = host, int(port)
        with socket.create_connection(place, 30) as silent, socket.create_connection(place, 30) as slow:
            slow.sendall(head)
            with socket.create_connection(place, 30) as third:
                assert third.recv(1) == b""
            assert silent.recv(1) == slow.recv(1) == b""
        with socket.create_connection(place, 30) as second_request:
            second_request.sendall(head + b"\r\n")
            assert b"200 OK" in second_request.recv(4096)
            second_request.sendall(head)
            while second_request.recv(4096):
                pass


def test_the_log_names_the_request_that_failed(
    net: Swarm, tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Before the first token, and in the middle of a stream, whose status has been sent."""
    fails_after = 0

    class Broken(Turn):
        def after_text(self, text: str, *, ends: bool) -> Any:
            nonlocal fails_after
            fails_after -= 1
            if fails_after < 0:
                raise RuntimeError("nobody knows")
            return super().after_text(text, ends=ends)

    monkeypatch.setattr("shoal.gateway.endpoints.chat_completions.Turn", Broken)
    monkeypatch.setattr(logging.getLogger("shoal"), "propagate", True)
    body = {"model": "stories", "messages": MESSAGES, "max_tokens": 4, "stream": True}
    with served_at(application(Gateway([ServedModel("stories", net.model(), tokenizer)], Admission()))) as url:
        for fails_after, status in ((0, 200), (2, 200)):
            name = f"mine-{fails_after}"
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": name})
            assert answer.status_code == status
            assert answer.headers["x-request-id"] == name
            assert "internal_error" in answer.text
            assert "nobody knows" not in answer.text
            assert f"{name} ended with an error: nobody knows" in caplog.text
        name, fails_after = "whole", 0
        answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": False}, headers={"x-request-id": name})
        assert answer.status_code == 500
        assert "whole POST /v1/chat/completions failed" in caplog.text
