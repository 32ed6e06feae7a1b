"""The bodies of requests, typed, with their limits. What is not here is refused.

The fields are OpenAI's. `top_k`, `min_p` and `repetition_penalty` are in addition, as vLLM has them. Fields that change
nothing in an answer, such as `user`, are taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_TOKENS = 1 << 20
MAX_MESSAGES = 4096
MAX_TEXT = 4 << 20
"""Characters of one text."""

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Prompt = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """What all bodies have in common: a field that is not known is an error, one that is null is not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Body):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer keeps to, as OpenAI has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an answer keeps to, as vLLM has it: one of these."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None = None
    choice: Annotated[list[StopText], Field(min_length=1, max_length=1000)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=100_000)] | None = None


class SamplingBody(Body):
    """The fields of a request that say how tokens are chosen, and how long a text may get."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    type: Literal["text"]
    text: Text


class FunctionCall(Body):
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: Text


class ToolCall(Body):
    id: Annotated[str, StringConstraints(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
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


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A function that a model may call."""

    type: Literal["function"]
    function: Function


class NamedTool(Body):
    type: Literal["function"]
    function: dict[str, str]


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
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Field(max_length=32)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; `None` for as many as the model allows."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(SamplingBody):
    """`POST /v1/completions`."""

    prompt: Text | Prompt | Annotated[list[Text] | list[Prompt], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as tokens."""
        return _as_list(self.prompt)


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    input: Text | Prompt | Annotated[list[Text] | list[Prompt], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: Text | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs, as texts or as tokens."""
        return _as_list(self.input)


def _as_list(given: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    """One text, or the tokens of one, as a list of it; several as they are."""
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else given


class InputPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
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


class InputCall(Body):
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


class InputResult(Body):
    """What a tool has returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, StringConstraints(max_length=256)]
    output: Text
    id: str | None = None
    status: str | None = None

    def as_chat(self) -> dict[str, Any]:
        """As a message of a chat."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class InputReasoning(Body):
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


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
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


class ResponsesRequest(Body):
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
    tool_choice: Literal["none", "auto", "required"] | None = None
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
        return {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": None if self.tools is None else [tool.as_chat() for tool in self.tools],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": None if self.text is None else self.text.as_chat(),
        }
