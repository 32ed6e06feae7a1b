"""`POST /v1/responses`: a chat in the form of OpenAI's newer API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shoal.gateway.bodies.base_body import MAX_MESSAGES, BaseBody, Count, Text
from shoal.gateway.bodies.chat_body import Function


class InputPart(BaseBody):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(BaseBody):
    """A message of a conversation. What answers add to theirs is taken, so that they can be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(max_length=1024)]
    id: str | None = None
    status: str | None = None

    def as_chat(self) -> dict[str, Any]:
        """As a message of a chat."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class InputCall(BaseBody):
    """A tool that was called."""

    type: Literal["function_call"]
    call_id: Annotated[str, StringConstraints(max_length=256)]
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: Text
    id: str | None = None
    status: str | None = None

    def as_chat(self) -> dict[str, Any]:
        """As a message of a chat."""
        call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
        return {"role": "assistant", "tool_calls": [call]}


class InputResult(BaseBody):
    """What a tool has returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, StringConstraints(max_length=256)]
    output: Text
    id: str | None = None
    status: str | None = None

    def as_chat(self) -> dict[str, Any]:
        """As a message of a chat."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class InputReasoning(BaseBody):
    """What a model has thought. Chat templates drop it."""

    type: Literal["reasoning"]
    id: str | None = None
    status: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None

    def as_chat(self) -> None:
        """No message of a chat."""


class FlatTool(Function):
    """A function that a model may call."""

    type: Literal["function"]

    def as_chat(self) -> dict[str, Any]:
        """As a tool of a chat."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class FlatNamedTool(BaseBody):
    """The function that a model has to call."""

    type: Literal["function"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]


class TextFormat(BaseBody):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(BaseBody):
    """What an answer keeps to."""

    format: TextFormat | None = None
    verbosity: None = None

    def described(self) -> dict[str, Any]:
        """As it was given."""
        return {"type": "text"} if self.format is None else self.format.model_dump(by_alias=True, exclude_none=True)

    def as_chat(self) -> dict[str, Any]:
        """As the format of a chat's answer."""
        if self.format is None or self.format.type != "json_schema":
            return {"type": self.described()["type"]}
        schema = self.format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}


InputItem = InputMessage | InputCall | InputResult | InputReasoning


class ResponsesRequest(BaseBody):
    """`POST /v1/responses`."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    store: bool | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    user: Text | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def as_chat(self) -> dict[str, Any]:
        """The same as a chat."""
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        messages += [message for item in items if (message := item.as_chat()) is not None]
        choice: Any = self.tool_choice
        if isinstance(choice, FlatNamedTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": None if self.tools is None else [tool.as_chat() for tool in self.tools],
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": None if self.text is None else self.text.as_chat(),
        }
