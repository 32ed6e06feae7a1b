"""The clients of OpenAI and Anthropic get from a gateway what plain Transformers says."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
import torch
from transformers import PreTrainedModel

from shoal.gateway.app import Gateway, application
from shoal.gateway.guard.admission import Admission
from shoal.gateway.served_model import ServedModel
from shoal.prefix import PAGE_TOKENS

from ..gateways import served_at
from ..harness import Swarm
from .asked import MESSAGES, PROMPT, TOOLS, Expected


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


def test_a_predicted_output_is_guessed_and_changes_no_token(client: openai.OpenAI, expected: Expected):
    text = expected("Once upon a time ", 60)
    for content in (text, [{"type": "text", "text": text}], "Something else altogether"):
        done = client.chat.completions.create(
            model="stories",
            messages=MESSAGES,
            max_tokens=60,
            temperature=0,
            prediction={"type": "content", "content": content},  # type: ignore[typeddict-item]
        )
        assert done.choices[0].message.content == text
        if content == text:
            assert done.usage is not None
            assert done.usage.completion_tokens == 60
            assert done.usage.completion_tokens_details is not None
            assert (done.usage.completion_tokens_details.accepted_prediction_tokens or 0) > 0


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
