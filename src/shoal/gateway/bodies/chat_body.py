"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shoal.gateway.bodies.base_body import MAX_MESSAGES, BaseBody, Count, Text
from shoal.gateway.bodies.sampling_body import SamplingBody


class TextPart(BaseBody):
    type: Literal["text"]
    text: Text


class FunctionCall(BaseBody):
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: Text


class ToolCall(BaseBody):
    id: Annotated[str, StringConstraints(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseBody):
    """A message of a conversation. `content` may come in parts, all of them text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None

    @property
    def text(self) -> str:
        """The whole content."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Prediction(BaseBody):
    """A text that much of the answer may repeat: OpenAI's predicted output."""

    type: Literal["content"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)]

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Function(BaseBody):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseBody):
    """A function that a model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(BaseBody):
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]


class NamedTool(BaseBody):
    """The function that a model has to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingBody):
    """`POST /v1/chat/completions`. `chat_template_kwargs` go to the model's chat template, as in vLLM."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Field(max_length=32)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; `None` for as many as the model allows."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
