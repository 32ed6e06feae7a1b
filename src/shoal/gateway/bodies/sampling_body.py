"""The fields that say how tokens are chosen, what an answer keeps to, and how it comes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shoal.gateway.bodies.base_body import BaseBody, Bias, StopText, Text, TokenId


class StreamOptions(BaseBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(BaseBody):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseBody):
    """What an answer keeps to, as OpenAI has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseBody):
    """What an answer keeps to, as vLLM has it: one of these."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None = None
    choice: Annotated[list[StopText], Field(min_length=1, max_length=1000)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=100_000)] | None = None


class SamplingBody(BaseBody):
    """The fields of a request that say how tokens are chosen, and how long a text may get."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None  # 0 and -1: from all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
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

    @property
    def includes_usage_so_far(self) -> bool:
        """Whether every chunk of a stream that ends with the numbers of tokens has those up to it, as in vLLM."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats
