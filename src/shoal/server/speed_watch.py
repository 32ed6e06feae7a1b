"""The speed that a server announces, and its correction by the passes that the server computes.

The measurement at the start is short, and other programs may have run meanwhile. So the server compares each pass that
it can with the announced speed. If most recent passes took more than twice as long, or less than half as long, the
server announces the speed of these passes.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.server.kv.batch import Chunk
from shoal.spans import Span

log = logging.getLogger(__name__)

MIN_PASSES, MAX_PASSES = 20, 60
"""A correction needs at least this many passes, and considers at most the latest of this many."""
MIN_SECONDS = 30.0
"""A correction needs passes over at least this time. Shorter disturbances, such as a program that starts, pass."""
FACTOR = 2.0
"""A pass contradicts the announced speed if it is this many times slower or faster."""
MIN_AGREEMENT = 0.75
"""The fraction of the passes that have to contradict the announced speed in the same direction."""
MAX_PAST_TOKENS = 1024
"""Steps with more tokens in the cache are not compared: they take longer than the step that was measured."""
MEASURED_PREFILL_TOKENS = 128
"""The length of the prompt that is measured. Shorter prompts are slower for each token, longer ones often faster."""


@dataclass(frozen=True)
class Speeds:
    """Tokens per second through a whole span, when one session decodes and when a prompt is read."""

    decode: float
    prefill: float

    def __str__(self) -> str:
        return f"{self.decode:.3g} tokens/s decoding and {self.prefill:.3g} reading prompts"


@dataclass(frozen=True)
class RecentPasses:
    """When the latest passes ended, in seconds, and how many times the announced time each took."""

    passes: tuple[tuple[float, float], ...] = ()

    def with_pass(self, ratio: float, *, now: float) -> RecentPasses:
        """These passes and one more."""
        return RecentPasses((*self.passes[1 - MAX_PASSES :], (now, ratio)))

    @property
    def correction(self) -> float | None:
        """How many times the announced time a pass takes, if the passes contradict the announcement; else `None`."""
        if len(self.passes) < MIN_PASSES or self.passes[-1][0] - self.passes[0][0] < MIN_SECONDS:
            return None
        ratios = [ratio for _, ratio in self.passes]
        enough = MIN_AGREEMENT * len(ratios)
        if sum(ratio > FACTOR for ratio in ratios) >= enough or sum(ratio < 1 / FACTOR for ratio in ratios) >= enough:
            return statistics.median(ratios)
        return None


def decoding_ratio(speeds: Speeds, span: Span, chunks: Sequence[Chunk], seconds: float) -> float | None:
    """How many times the announced time a pass that only decodes took; `None` if the two cannot be compared.

    A pass of more work than one token can only show that the server is faster than announced.
    """
    if any(chunk.span != span for chunk in chunks):
        return None
    ratio = seconds * speeds.decode
    return ratio if ratio < 1 or _is_plain(chunks, num_tokens=1) else None


def prefill_ratio(speeds: Speeds, span: Span, chunks: Sequence[Chunk], seconds: float) -> float | None:
    """How many times the announced time a pass of prompts took; `None` if the two cannot be compared."""
    num_tokens = sum(chunk.hidden_BTD.shape[0] * chunk.hidden_BTD.shape[1] for chunk in chunks)
    if num_tokens < MEASURED_PREFILL_TOKENS or any(chunk.span != span for chunk in chunks):
        return None
    per_token = seconds * speeds.prefill / num_tokens
    if per_token > 1:
        return per_token if _is_plain(chunks) else None
    return min(1.0, seconds * speeds.prefill / MEASURED_PREFILL_TOKENS)  # below 1 if more tokens took less time


def _is_plain(chunks: Sequence[Chunk], num_tokens: int | None = None) -> bool:
    """Whether a pass is one sequence, of `num_tokens` tokens if given, and nothing but blocks takes time in it."""
    if len(chunks) != 1:
        return False
    (chunk,) = chunks
    rows, tokens, _ = chunk.hidden_BTD.shape
    if rows != 1 or tokens != (num_tokens or tokens):
        return False
    return chunk.num_computed_tokens <= MAX_PAST_TOKENS and not chunk.adapters and chunk.wanted is None


class Watch:
    """The speeds that a server announces, corrected by its passes. `on_correction` is called with new speeds."""

    def __init__(
        self, speeds: Speeds, span: Span, *, on_correction: Callable[[Speeds], None] = lambda speeds: None
    ) -> None:
        self.speeds = speeds
        self._span = span
        self._on_correction = on_correction
        self._decoding = self._prefill = RecentPasses()

    def decoded(self, chunks: Sequence[Chunk], seconds: float, *, now: float) -> None:
        """Record a pass that only decoded, and took `seconds`."""
        ratio = decoding_ratio(self.speeds, self._span, chunks, seconds)
        if ratio is None:
            return
        self._decoding = self._decoding.with_pass(ratio, now=now)
        if factor := self._decoding.correction:
            self._decoding = RecentPasses()
            self._correct(replace(self.speeds, decode=self.speeds.decode / factor))

    def prefilled(self, chunks: Sequence[Chunk], seconds: float, *, now: float) -> None:
        """Record a pass that only read prompts, and took `seconds`."""
        ratio = prefill_ratio(self.speeds, self._span, chunks, seconds)
        if ratio is None:
            return
        self._prefill = self._prefill.with_pass(ratio, now=now)
        if factor := self._prefill.correction:
            self._prefill = RecentPasses()
            self._correct(replace(self.speeds, prefill=self.speeds.prefill / factor))

    def forget(self) -> None:
        """Begin anew: what the latest passes have shown was at another time."""
        self._decoding = self._prefill = RecentPasses()

    def _correct(self, speeds: Speeds) -> None:
        log.warning("the passes contradict the measured speed: announcing %s, not %s", speeds, self.speeds)
        self.speeds = speeds
        self._on_correction(speeds)
