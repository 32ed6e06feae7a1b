"""What comes from others is parsed strictly."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Parsed, it has its own fields, each of its own type, and nothing else. It never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
