"""The gateway behind a real socket, asked by OpenAI's own client, in front of a swarm in memory."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shoal.bundled import STORIES
from shoal.gateway.app import Gateway, application
from shoal.gateway.endpoints.turns import Turn
from shoal.gateway.guard.admission import Admission
from shoal.gateway.served_model import ServedModel
from shoal.prefix import PAGE_TOKENS

from .gateways import served_at
from .harness import QUICK, Swarm, swarm_of

PROMPT = "Once upon a time"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}"
MESSAGES: Any = [{"role": "system", "content": "Once upon"}, {"role": "user", "content": "a time"}]


@pytest.fixture(scope="module")
def stories() -> PreTrainedModel:
    """The bundled model in one piece: the oracle."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(STORIES)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def net() -> Iterator[Swarm]:
    with swarm_of(STORIES, "0:6", "6:12") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def url(net: Swarm, tokenizer: Any) -> Iterator[str]:
    served = ServedModel("stories", net.model(), tokenizer)
    with served_at(application(Gateway([served], Admission()))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


Expected = Callable[..., str]


@pytest.fixture(scope="module")
def expected(stories: PreTrainedModel, tokenizer: Any) -> Expected:
    """What plain Transformers continues a prompt with."""

    def expected(prompt: str = PROMPT, num_tokens: int = 16, **options: Any) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        text = stories.generate(ids, max_new_tokens=num_tokens, **({"do_sample": False} | options))
        return str(tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True))

    return expected


def test_the_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").owned_by == "shoal"
    with pytest.raises(openai.NotFoundError, match="there is stories"):
        client.models.retrieve("other")


def test_a_completion_is_what_the_whole_model_says(client: openai.OpenAI, expected: Expected):
    done = client.completions.create(model="stories", prompt=PROMPT, max_tokens=16, temperature=0)
    assert done.choices[0].text == expected()
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 16
    assert done.usage.total_tokens == done.usage.prompt_tokens + 16


def test_a_chat_is_what_the_whole_model_says_to_its_template(client: openai.OpenAI, expected: Expected):
    done = client.chat.completions.create(model="stories", messages=MESSAGES, max_tokens=16, temperature=0)
    assert done.choices[0].message.content == expected("Once upon a time ")
    assert done.choices[0].message.role == "assistant"


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client: openai.OpenAI, expected: Expected):
    chunks = list(
        client.chat.completions.create(
            model="stories",
            messages=MESSAGES,
            max_completion_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected("Once upon a time ")
    assert len(chunks) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_a_seed_repeats_an_answer_and_n_gives_several(client: openai.OpenAI, stories: PreTrainedModel, tokenizer: Any):
    ask = {"model": "stories", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    one, again = (client.completions.create(**ask, n=3) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for index, text in enumerate(texts):
        torch.manual_seed(5 + index)
        found = stories.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.9, top_p=0.8, top_k=0)
        assert text == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert one.usage is not None
    assert one.usage.completion_tokens == 36
    assert one.usage.prompt_tokens == ids.shape[1]


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, expected: Expected):
    text = expected(num_tokens=24)
    stop = text[9:14]
    for stream in (False, True):
        done = client.completions.create(
            model="stories", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop, "never said"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in done] if stream else done.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_whole_model(
    client: openai.OpenAI, stories: PreTrainedModel, tokenizer: Any
):
    done = client.completions.create(model="stories", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2, echo=True)
    found = done.choices[0].logprobs
    assert found is not None
    ids = tokenizer(done.choices[0].text, return_tensors="pt")["input_ids"]
    logprobs_SV = torch.log_softmax(stories(ids).logits[0].detach(), dim=-1)
    want = [float(row_V[token]) for row_V, token in zip(logprobs_SV[:-1], ids[0, 1:], strict=True)]
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(want, abs=1e-3)
    chat = client.chat.completions.create(
        model="stories", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=4
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert [len(token.top_logprobs) for token in content] == [4, 4, 4]
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)
    assert "".join(token.token for token in content).strip() == (chat.choices[0].message.content or "").strip()


def test_an_answer_goes_on_beyond_its_end_and_counts_as_it_goes(client: openai.OpenAI, tokenizer: Any):
    ask: dict[str, Any] = {"model": "stories", "max_tokens": 6, "temperature": 0}
    ask["logit_bias"] = {str(tokenizer.eos_token_id): 100}
    counted = {"include_usage": True, "continuous_usage_stats": True}
    for create, prompt in (
        (client.completions.create, {"prompt": PROMPT}),
        (client.chat.completions.create, {"messages": MESSAGES}),
    ):
        endless: dict[str, Any] = ask | prompt | {"extra_body": {"ignore_eos": True}}
        ends: Any = create(**ask, **prompt)
        goes_on: Any = create(**endless)
        assert (ends.choices[0].finish_reason, ends.usage.completion_tokens) == ("stop", 1)
        assert (goes_on.choices[0].finish_reason, goes_on.usage.completion_tokens) == ("length", 6)
        chunks: Any = list(create(**endless, stream=True, stream_options=counted))
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 6
        assert all(chunk.usage.prompt_tokens == goes_on.usage.prompt_tokens for chunk in chunks)
    with pytest.raises(openai.BadRequestError, match="ends with it"):
        client.completions.create(**ask, prompt=PROMPT, extra_body={"ignore_eos": True, "structured_outputs": CHOICE})


def test_biases_and_penalties_change_what_is_said(client: openai.OpenAI, expected: Expected, tokenizer: Any):
    first = tokenizer(PROMPT + expected(), return_tensors="pt")["input_ids"][
        0, tokenizer(PROMPT, return_tensors="pt")["input_ids"].shape[1]
    ]
    ask = {"model": "stories", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    banned = client.completions.create(**ask, logit_bias={str(int(first)): -100})
    assert banned.choices[0].text != expected()
    only = client.completions.create(**ask, logit_bias={str(int(first)): 100})
    assert only.choices[0].text == tokenizer.decode([int(first)] * 16)
    varied = client.completions.create(
        **ask, logit_bias={str(int(first)): 100}, frequency_penalty=2, presence_penalty=2
    )
    assert varied.choices[0].text == only.choices[0].text  # 100 outweighs 16 times 2 and 2
    assert client.completions.create(**ask, presence_penalty=2, frequency_penalty=2).choices[0].text != expected()


def test_prompts_may_be_tokens_and_several(client: openai.OpenAI, expected: Expected, tokenizer: Any):
    prompts = [tokenizer(text)["input_ids"] for text in (PROMPT, "The big dog")]
    done = client.completions.create(model="stories", prompt=prompts, max_tokens=8, temperature=0)
    assert [choice.text for choice in done.choices] == [expected(PROMPT, 8), expected("The big dog", 8)]
    assert [choice.index for choice in done.choices] == [0, 1]


def test_a_prompt_may_have_the_token_for_padding(client: openai.OpenAI, stories: PreTrainedModel, tokenizer: Any):
    assert tokenizer.pad_token_id is not None
    ids = [*tokenizer(PROMPT)["input_ids"], tokenizer.pad_token_id, *tokenizer("The dog")["input_ids"]]
    done = client.completions.create(model="stories", prompt=ids, max_tokens=8, temperature=0)
    ids_1S = torch.tensor([ids])
    found = stories.generate(ids_1S, attention_mask=torch.ones_like(ids_1S), max_new_tokens=8, do_sample=False)
    assert done.choices[0].text == tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def test_embeddings_are_mean_hidden_states(client: openai.OpenAI, stories: PreTrainedModel, tokenizer: Any):
    found = client.embeddings.create(model="stories", input=[PROMPT, "The big dog"])
    for each, text in zip(found.data, (PROMPT, "The big dog"), strict=True):
        hidden_1SD = stories.model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state  # type: ignore[union-attr,operator]
        assert each.embedding == pytest.approx(hidden_1SD[0].mean(dim=0).tolist(), abs=1e-4)


CHOICE = {"choice": ["a dog.", "a (cat)"]}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Lily", "Tim"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_an_answer_keeps_to_a_schema_an_expression_or_a_choice(client: openai.OpenAI):
    ask: dict[str, Any] = {"model": "stories", "messages": MESSAGES, "max_tokens": 60, "seed": 1}
    for stream in (False, True):
        form: Any = {"type": "json_schema", "json_schema": {"name": "child", "schema": SCHEMA}}
        done: Any = client.chat.completions.create(**ask, response_format=form, stream=stream)
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in done)
            if stream
            else done.choices[0].message.content
        )
        found = json.loads(text)
        assert found.keys() == {"name", "age"}
        assert found["name"] in ("Lily", "Tim")
        assert 1 <= found["age"] <= 9
    done = client.chat.completions.create(**ask, extra_body={"structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}})
    assert re.fullmatch("[ab]{3}-[0-9]{2}", done.choices[0].message.content)
    assert done.choices[0].finish_reason == "stop"
    done = client.chat.completions.create(**ask, extra_body={"structured_outputs": CHOICE})
    assert done.choices[0].message.content in ("a dog.", "a (cat)")
    done = client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=60, extra_body={"structured_outputs": {"grammar": 'start: "x"+ "y"'}}
    )
    assert re.fullmatch("x+y?", done.choices[0].text)


QWEN = {
    "defaults": {"role": "assistant"},
    "start_anchor": "a time ",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]
ANTHROPIC_TOOLS: Any = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]


def test_reasoning_and_calls_of_tools_are_recognized(net: Swarm, tokenizer: Any):
    turns = copy.deepcopy(tokenizer)
    turns.response_template = QWEN
    served = ServedModel("stories", net.model(), turns)
    says = (
        '<think>it may rain</think>Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    )
    ask: dict[str, Any] = {"model": "stories", "messages": MESSAGES, "max_tokens": 200, "tools": TOOLS}
    ask["extra_body"] = {"structured_outputs": {"choice": [says]}}
    with served_at(application(Gateway([served], Admission()))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (choice,) = client.chat.completions.create(**ask).choices
        assert choice.message.content == "Let me see."
        assert choice.message.reasoning_content == "it may rain"  # type: ignore[attr-defined]
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        assert choice.finish_reason == "tool_calls"
        with client.chat.completions.stream(**ask) as stream:
            stream.until_done()
            message = stream.get_final_completion().choices[0].message
        assert message.content == "Let me see."
        assert [each.function.name for each in message.tool_calls or []] == ["weather"]


def forced(choice: Any) -> dict[str, Any]:
    return {"model": "stories", "messages": MESSAGES, "max_tokens": 120, "tools": TOOLS, "tool_choice": choice}


def test_a_model_that_has_to_call_a_tool_does(client: openai.OpenAI):
    """Also one that has no way of its own to say so."""
    done = client.chat.completions.create(**forced("required"), parallel_tool_calls=False, seed=1).choices[0]
    (call,) = done.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city", "days"}
    assert (done.message.content, done.finish_reason) == (None, "tool_calls")

    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(**forced(named), seed=2) as stream:
        stream.until_done()
        done = stream.get_final_completion().choices[0]
    (call,) = done.message.tool_calls or []
    assert json.loads(call.function.arguments)["days"] in range(1, 10)
    assert done.finish_reason == "stop"

    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    answer = client.responses.create(
        model="stories", input=MESSAGES, tools=flat, tool_choice={"type": "function", "name": "weather"}
    )
    assert [item.type for item in answer.output] == ["function_call"]

    cut = client.chat.completions.create(**{**forced("required"), "max_tokens": 3}).choices[0]
    assert (cut.message.tool_calls, cut.finish_reason) == (None, "length")
    for choice, tools in (("required", []), ({"type": "function", "function": {"name": "other"}}, TOOLS)):
        with pytest.raises(openai.BadRequestError, match="tool"):
            client.chat.completions.create(**{**forced(choice), "tools": tools})


def test_several_tools_share_their_definitions(client: openai.OpenAI):
    def tool(name: str, place: dict[str, Any]) -> Any:
        parameters = {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}},
            "required": ["place"],
            "additionalProperties": False,
            "$defs": {"Place": place},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    rome, oslo = {"const": "Rome"}, {"const": "Oslo"}
    ask = {**forced("required"), "tools": [tool("go", rome), tool("stay", rome)], "parallel_tool_calls": False}
    (call,) = client.chat.completions.create(**ask).choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"place": "Rome"}
    with pytest.raises(openai.BadRequestError, match="define Place differently"):
        client.chat.completions.create(**{**ask, "tools": [tool("go", rome), tool("stay", oslo)]})


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def test_messages_are_chats_in_the_form_of_anthropic(claude: anthropic.Anthropic, expected: Expected):
    ask: dict[str, Any] = {"model": "stories", "max_tokens": 16, "system": "Once upon"}
    ask["extra_body"] = {"temperature": 0}
    ask["messages"] = [{"role": "user", "content": [{"type": "text", "text": "a time"}]}]
    done = claude.messages.create(**ask)
    assert [block.type for block in done.content] == ["text"]
    assert done.content[0].text == expected("Once upon a time ")  # type: ignore[union-attr]
    assert (done.stop_reason, done.usage.output_tokens) == ("max_tokens", 16)
    with claude.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == expected("Once upon a time ")
        last = stream.get_final_message()
    assert last.usage.output_tokens == 16
    assert last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0) == done.usage.input_tokens
    counted = claude.messages.count_tokens(**{name: ask[name] for name in ("model", "system", "messages")})
    assert counted.input_tokens == done.usage.input_tokens
    word = expected("Once upon a time ").split()[3]
    schema: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    kept = claude.messages.create(**{**ask, "max_tokens": 60}, output_config=schema)
    assert json.loads(kept.content[0].text).keys() == {"name", "age"}  # type: ignore[union-attr]
    stopped = claude.messages.create(**ask, stop_sequences=[word, "never"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)


def test_messages_call_tools_and_read_what_they_return(claude: anthropic.Anthropic):
    ask: dict[str, Any] = {"model": "stories", "max_tokens": 120, "tools": ANTHROPIC_TOOLS}
    said: list[Any] = [{"role": "user", "content": "Once upon a time"}]
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    done = claude.messages.create(**ask, messages=said, tool_choice=choice)
    (block,) = done.content
    assert block.type == "tool_use"
    assert block.name == "weather"
    assert block.input.keys() == {"city", "days"}
    assert done.stop_reason == "tool_use"
    with claude.messages.stream(**ask, messages=said, tool_choice={"type": "tool", "name": "weather"}) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input.keys() == {"city", "days"}
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "It rains."}
    said += [{"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
    more = claude.messages.create(model="stories", max_tokens=4, messages=said)
    assert [each.type for each in more.content] == ["text"]


def test_what_messages_do_not_support_is_an_error_of_anthropic(claude: anthropic.Anthropic, url: str):
    ask: dict[str, Any] = {"model": "stories", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    prefilled = [*ask["messages"], {"role": "assistant", "content": "Well"}]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    for change in (
        {"messages": prefilled},
        {"messages": [{"role": "user", "content": [image]}]},
        {"thinking": {"type": "x"}},
    ):
        with pytest.raises(anthropic.BadRequestError) as refused:
            claude.messages.create(**{**ask, **change})
        assert refused.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError, match="does not exist here"):
        claude.messages.create(**{**ask, "model": "other"})
    assert httpx.post(f"{url}/v1/messages", json={}).json()["type"] == "error"


def test_responses_are_chats_in_another_form(client: openai.OpenAI, expected: Expected):
    ask: dict[str, Any] = {"model": "stories", "max_output_tokens": 16, "temperature": 0}
    done = client.responses.create(**ask, instructions="Once upon", input="a time")
    assert done.output_text == expected("Once upon a time ")
    assert done.status == "incomplete"
    assert done.usage is not None
    assert done.usage.output_tokens == 16
    kinds, text = [], ""
    for event in client.responses.create(**ask, input=MESSAGES, stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type == "response.incomplete":
            assert event.response.output_text == text
    assert text == expected("Once upon a time ")
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    form: Any = {"format": {"type": "json_schema", "name": "child", "schema": SCHEMA}}
    done = client.responses.create(model="stories", input="a child", max_output_tokens=60, text=form)
    assert json.loads(done.output_text).keys() == {"name", "age"}
    assert done.status == "completed"
    more = client.responses.create(**ask, input=[*MESSAGES, *[item.model_dump() for item in done.output]])
    assert more.output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(**ask, input="hi", previous_response_id="resp_1")


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


def test_usage_tells_how_much_of_a_prompt_the_servers_had_computed_already(client: openai.OpenAI):
    prompt = "The fox and the bear went down to the river, and there they saw a boat. " * 4
    for _ in range(2):
        done = client.completions.create(model="stories", prompt=prompt, max_tokens=2, temperature=0)
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
    cached = done.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached == done.usage.prompt_tokens // PAGE_TOKENS * PAGE_TOKENS > 0
    answer = client.responses.create(model="stories", input="The fox", max_output_tokens=2)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 0


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
