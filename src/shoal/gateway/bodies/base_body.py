"""What all bodies have in common: their limits, and that a field that is not known is an error."""

from __future__ import annotations

from typing import Annotated, Any

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


class BaseBody(BaseModel):
    """What all bodies have in common: a field that is not known is an error, one that is null is not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value
