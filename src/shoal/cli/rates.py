"""Speeds as people read them: three digits that say something, and none where nothing was measured."""

from __future__ import annotations

UNKNOWN = "…"


def figure(rate: float | None) -> str:
    """A rate without its unit, for a column of a table."""
    if not rate:
        return UNKNOWN
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def tokens_per_second(rate: float | None) -> str:
    """A rate of tokens, with its unit."""
    return f"{figure(rate)} tokens/s" if rate else "not measured"
