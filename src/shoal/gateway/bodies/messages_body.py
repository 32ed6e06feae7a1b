"""`POST /v1/messages`: a chat in the form of Anthropic's API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shoal.gateway.bodies.base_body import MAX_MESSAGES, BaseBody, Count, StopText, Text

Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]
CacheControl = dict[str, str]
"""Where a prompt should be cached. Servers cache all of it anyway."""


class TextBlock(BaseBody):
    type: Literal["text"]
    text: Text
    citations: Annotated[list[Any], Field(max_length=0)] | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(BaseBody):
    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class Caller(BaseBody):
    type: Literal["direct"]


class ToolUseBlock(BaseBody):
    """A tool that the model called."""

    type: Literal["tool_use"]
    id: Id
    name: Id
    input: dict[str, Any]
    caller: Caller | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(BaseBody):
    """What a tool has returned."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Text | Annotated[list[TextBlock], Field(max_length=1024)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        """The whole result."""
        return _joined(self.content)


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class SystemMessage(BaseBody):
    role: Literal["system"]
    content: Text | Annotated[list[TextBlock], Field(min_length=1, max_length=1024)]

    def as_chat(self) -> list[dict[str, Any]]:
        """As a message of a chat."""
        return [{"role": "system", "content": _joined(self.content)}]


class UserMessage(BaseBody):
    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(min_length=1, max_length=1024)]

    def as_chat(self) -> list[dict[str, Any]]:
        """As messages of a chat: what tools returned, and then what the user says."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        results = [each for each in self.content if isinstance(each, ToolResultBlock)]
        said = [each for each in self.content if isinstance(each, TextBlock)]
        found = [{"role": "tool", "tool_call_id": each.tool_use_id, "content": each.text} for each in results]
        return found + ([{"role": "user", "content": _joined(said)}] if said else [])


class AssistantMessage(BaseBody):
    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(max_length=1024)]

    def as_chat(self) -> list[dict[str, Any]]:
        """As a message of a chat."""
        if isinstance(self.content, str):
            return [{"role": "assistant", "content": self.content}]
        found: dict[str, Any] = {"role": "assistant"}
        found["content"] = _joined([each for each in self.content if isinstance(each, TextBlock)])
        if thoughts := [each.thinking for each in self.content if isinstance(each, ThinkingBlock)]:
            found["reasoning_content"] = "".join(thoughts)
        calls = [each for each in self.content if isinstance(each, ToolUseBlock)]
        if calls:
            found["tool_calls"] = [
                {"id": each.id, "function": {"name": each.name, "arguments": json.dumps(each.input)}} for each in calls
            ]
        return [found]


class InputSchemaTool(BaseBody):
    """A function that a model may call."""

    type: Literal["custom"] | None = None
    name: Id
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: CacheControl | None = None

    def as_chat(self) -> dict[str, Any]:
        """As a tool of a chat."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolChoice(BaseBody):
    """Which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Id | None = None
    disable_parallel_tool_use: bool | None = None

    def as_chat(self) -> Any:
        """As the choice of a chat."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name or ""}}
        return {"any": "required"}.get(self.type, self.type)


class Thinking(BaseBody):
    """Whether the model thinks first. How long it thinks is left to it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(BaseBody):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseBody):
    """What an answer keeps to. How much effort it takes is left to the model."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Metadata(BaseBody):
    user_id: Annotated[str, StringConstraints(max_length=512)] | None = None


class PromptBody(BaseBody):
    """`POST /v1/messages/count_tokens`: what a model reads."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    system: Text | Annotated[list[TextBlock], Field(max_length=1024)] | None = None
    thinking: Thinking | None = None
    tools: Annotated[list[InputSchemaTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    def as_chat(self) -> dict[str, Any]:
        """The same as a chat."""
        messages = [{"role": "system", "content": _joined(self.system)}] if self.system else []
        messages += [each for message in self.messages for each in message.as_chat()]
        choice, thinking = self.tool_choice, self.thinking
        thinks = None if thinking is None or thinking.type == "adaptive" else thinking.type == "enabled"
        form = None if self.output_config is None else self.output_config.format
        json_schema = None if form is None else {"name": "answer", "schema": form.schema_}
        return {
            "model": self.model,
            "messages": messages,
            "response_format": None if form is None else {"type": "json_schema", "json_schema": json_schema},
            "tools": None if self.tools is None else [tool.as_chat() for tool in self.tools],
            "tool_choice": None if choice is None else choice.as_chat(),
            "parallel_tool_calls": None if choice is None else not choice.disable_parallel_tool_use,
            "chat_template_kwargs": None if thinks is None else {"enable_thinking": thinks},
        }


class MessagesRequest(PromptBody):
    """`POST /v1/messages`. `temperature`, `top_p` and `top_k` are those of the API's older versions."""

    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def as_chat(self) -> dict[str, Any]:
        return super().as_chat() | {
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
        }


def _joined(content: str | list[TextBlock] | None) -> str:
    if isinstance(content, list):
        return "\n\n".join(each.text for each in content)
    return content or ""
