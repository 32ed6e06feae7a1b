"""Strict parsing of what comes from other peers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen model that refuses unknown fields and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
