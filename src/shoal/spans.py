"""Spans of blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Span:
    """The blocks [start, end) of a model; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a span of blocks: {self.start}:{self.end}")

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, block: int | Span) -> bool:
        """Whether a block, or every block of another span, is in this span."""
        if isinstance(block, Span):
            return self.start <= block.start and block.end <= self.end
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    @classmethod
    def parse(cls, text: str) -> Span:
        """Parse a span such as "4:8". Raises `ValueError` for any other text."""
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if match is None:
            raise ValueError(f"not a span of blocks: {text!r} (write it as 0:8)")
        return cls(int(match[1]), int(match[2]))
