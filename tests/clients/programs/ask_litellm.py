"""LiteLLM: a chat, the same as a stream, a text, and a call of a tool."""

import json
import sys

import litellm

what = json.loads(sys.argv[1])
server = {"api_base": what["url"], "api_key": what["key"], "temperature": 0, "max_tokens": what["num_tokens"]}
chat = {"model": "openai/smollm2", "messages": what["messages"], **server}
whole = litellm.completion(**chat)
chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
text = litellm.text_completion(model="text-completion-openai/smollm2", prompt=what["prompt"], **server)
called = litellm.completion(**chat, tools=[what["tool"]], tool_choice="required").choices[0].message.tool_calls
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "finish_reason": whole.choices[0].finish_reason,
            "num_tokens": whole.usage.completion_tokens,
            "stream": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
            "num_streamed_tokens": next(
                chunk.usage for chunk in chunks if getattr(chunk, "usage", None)
            ).completion_tokens,
            "text": text.choices[0].text,
            "calls": [[call.function.name, json.loads(call.function.arguments)] for call in called],
        }
    )
)
