"""`POST /v1/completions` and `POST /v1/embeddings`: texts without a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from shoal.gateway.bodies.base_body import MAX_TOKENS, BaseBody, Prompt, Text
from shoal.gateway.bodies.sampling_body import SamplingBody

MAX_TEXTS = 128
"""Texts that one request may ask for: its prompts times `n`."""


class CompletionRequest(SamplingBody):
    """`POST /v1/completions`."""

    prompt: Text | Prompt | Annotated[list[Text] | list[Prompt], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @field_validator("prompt")
    @classmethod
    def _few_texts(cls, prompt: Any, info: ValidationInfo) -> Any:
        num_prompts, num_each = len(_as_list(prompt)), info.data.get("n") or 1
        if num_prompts * num_each > MAX_TEXTS:
            raise ValueError(f"{num_prompts} prompts with n={num_each} are more than {MAX_TEXTS} texts")
        return prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as tokens."""
        return _as_list(self.prompt)


class EmbeddingRequest(BaseBody):
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
