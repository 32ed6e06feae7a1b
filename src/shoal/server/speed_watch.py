"""How fast a server says that it is, and when its own passes show that this is wrong.

A measurement at the start takes a moment, and the moment may be a bad one. So each pass that can be compared with the
announced figures is: if most of them take less than half, or more than twice, as long for a while, the figure becomes
what they took.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.server.kv.batch import Chunk
from shoal.spans import Span

log = logging.getLogger(__name__)

FEW_PASSES, MANY_PASSES = 20, 60
"""At least so many passes have to agree; the latest of so many are looked at."""
WHILE_SECONDS = 30.0
"""Something that passes sooner, such as another program that starts, corrects nothing."""
FACTOR = 2.0
AGREEING = 0.75
COMPARABLE_PAST = 1024
"""With more tokens in its past, a step takes longer than the one that was measured."""
MEASURED_PREFILL = 128
"""Tokens of the prompt that is measured: shorter ones are slower for each token, longer ones often faster."""


@dataclass(frozen=True)
class Speeds:
    """Tokens per second through a whole span: one at a time, and many at once."""

    decode: float
    prefill: float

    def __str__(self) -> str:
        return f"{self.decode:.3g} tokens/s decoding and {self.prefill:.3g} reading prompts"


@dataclass(frozen=True)
class Seen:
    """What the latest passes took, in multiples of what was announced, and when they ended."""

    passes: tuple[tuple[float, float], ...] = ()

    def after(self, ratio: float, *, now: float) -> Seen:
        """With one more pass."""
        return Seen((*self.passes[1 - MANY_PASSES :], (now, ratio)))

    @property
    def correction(self) -> float | None:
        """How many times as long a pass takes as announced, if what was announced is to be corrected."""
        if len(self.passes) < FEW_PASSES or self.passes[-1][0] - self.passes[0][0] < WHILE_SECONDS:
            return None
        ratios = [ratio for _, ratio in self.passes]
        enough = AGREEING * len(ratios)
        if sum(ratio > FACTOR for ratio in ratios) >= enough or sum(ratio < 1 / FACTOR for ratio in ratios) >= enough:
            return statistics.median(ratios)
        return None


def decoding_ratio(speeds: Speeds, span: Span, chunks: Sequence[Chunk], seconds: float) -> float | None:
    """What a pass that only decodes took beside one of a single token; `None` if it says nothing about that.

    A pass with more work than a single token can only show that a token takes less.
    """
    if any(chunk.span != span for chunk in chunks):
        return None
    ratio = seconds * speeds.decode
    return ratio if ratio < 1 or _is_plain(chunks, num_tokens=1) else None


def prefill_ratio(speeds: Speeds, span: Span, chunks: Sequence[Chunk], seconds: float) -> float | None:
    """What a pass of a prompt took beside the announced time for so many tokens; `None` if it says nothing."""
    num_tokens = sum(chunk.hidden_BTD.shape[0] * chunk.hidden_BTD.shape[1] for chunk in chunks)
    if num_tokens < MEASURED_PREFILL or any(chunk.span != span for chunk in chunks):
        return None
    per_token = seconds * speeds.prefill / num_tokens
    if per_token > 1:
        return per_token if _is_plain(chunks) else None
    return min(1.0, seconds * speeds.prefill / MEASURED_PREFILL)  # more tokens in less time, or as announced


def _is_plain(chunks: Sequence[Chunk], num_tokens: int | None = None) -> bool:
    """Whether it is one sequence, of so many tokens, without anything that takes time beside the blocks."""
    if len(chunks) != 1:
        return False
    (chunk,) = chunks
    rows, tokens, _ = chunk.hidden_BTD.shape
    is_so_long = rows == 1 and tokens == (num_tokens or tokens)
    return is_so_long and chunk.num_computed_tokens <= COMPARABLE_PAST and not chunk.adapters and chunk.wanted is None


class Watch:
    """The figures that a server announces, corrected by its passes. `corrected` is called when they change."""

    def __init__(
        self, speeds: Speeds, span: Span, *, corrected: Callable[[Speeds], None] = lambda speeds: None
    ) -> None:
        self.speeds = speeds
        self._span = span
        self._corrected = corrected
        self._decoding = self._prefill = Seen()

    def decoded(self, chunks: Sequence[Chunk], seconds: float, *, now: float) -> None:
        """A pass in which sessions got their next tokens, and nothing else."""
        ratio = decoding_ratio(self.speeds, self._span, chunks, seconds)
        if ratio is None:
            return
        self._decoding = self._decoding.after(ratio, now=now)
        if factor := self._decoding.correction:
            self._decoding = Seen()
            self._correct(replace(self.speeds, decode=self.speeds.decode / factor))

    def prefilled(self, chunks: Sequence[Chunk], seconds: float, *, now: float) -> None:
        """A pass that read prompts, and did nothing else."""
        ratio = prefill_ratio(self.speeds, self._span, chunks, seconds)
        if ratio is None:
            return
        self._prefill = self._prefill.after(ratio, now=now)
        if factor := self._prefill.correction:
            self._prefill = Seen()
            self._correct(replace(self.speeds, prefill=self.speeds.prefill / factor))

    def _correct(self, speeds: Speeds) -> None:
        log.warning("this server announces %s instead of %s from now on, as its passes have shown", speeds, self.speeds)
        self.speeds = speeds
        self._corrected(speeds)
