"""Whose tokens are computed next: decisions only, from a picture of who is waiting.

A pass takes tokens of many sessions. Those who decode come first, all of them: somebody waits for each of their tokens,
and the weights are read once for all. What room is left goes to prefills, in the order in which they came, and cut so
that a pass with a part of a long prompt takes not much longer than one without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

DECODE_TOKENS = 8
"""Up to so many new tokens of a sequence, somebody is waiting for them: a decoding step, a guess being checked."""
MIN_PREFILL_TOKENS = 16
GROUPING_WEIGHT = 4
SMOOTHING = 0.2


@dataclass(frozen=True)
class RequestView:
    """A step that is not computed yet: `num_tokens` more of each of `num_rows` sequences.

    `num_pages` tells how many pages must be free to compute so many of its tokens. It has `running` if its session
    holds pages already. A `unsplittable` one is not cut.
    """

    num_rows: int
    num_tokens: int
    running: bool
    num_pages: Callable[[int], int]
    unsplittable: bool = False

    @property
    def decodes(self) -> bool:
        return self.running and self.num_tokens <= DECODE_TOKENS


@dataclass(frozen=True)
class SchedulerOutput:
    """The next pass: which of those that wait, by their index, and how many tokens of each row.

    `short_of_pages`: a session that has begun cannot go on; another has to give its pages up first. `kept_out` is the
    first of those that wait for pages to begin, and how many it lacks.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    short_of_pages: bool = False
    kept_out: tuple[int, int] | None = None


def schedule(
    requests: Sequence[RequestView], *, num_free_pages: int, max_num_batched_tokens: int, prefill_tokens: int
) -> SchedulerOutput:
    """The next pass, of at most `max_num_batched_tokens` tokens, `prefill_tokens` of them of prefills; `requests` as
    they came.

    Nobody waits for ever: a step that is too large for a pass gets one for itself, and the first of the prefills is in
    every pass, with a token of each row at least, or all of it if it is not to be cut.
    A session begins only when there is room for all that it came with, beside what those need who have begun, and no
    other begins before one that waits for that.
    """
    chunks: list[tuple[int, int]] = []
    room, prefill_room, pages = max_num_batched_tokens, prefill_tokens, num_free_pages
    pages_to_begin = num_free_pages - sum(step.num_pages(step.num_tokens) for step in requests if step.running)
    may_begin = may_be_one_by_one = True
    kept_out: tuple[int, int] | None = None
    for index in sorted(range(len(requests)), key=lambda each: not requests[each].decodes):
        step = requests[index]
        if not step.running and not may_begin:
            continue
        left = max(0, room if step.decodes else min(room, prefill_room))  # a turn of its own may have taken more
        num_tokens = min(step.num_tokens, left // step.num_rows)
        if step.unsplittable and num_tokens < step.num_tokens:
            num_tokens = 0
        if not num_tokens and may_be_one_by_one and (not chunks or not step.decodes or step.num_rows <= room):
            num_tokens = step.num_tokens if step.unsplittable else 1
        if not num_tokens:
            continue
        if step.running:
            needed = step.num_pages(num_tokens)
            if needed > pages:
                return SchedulerOutput(short_of_pages=True)
        else:
            needed = step.num_pages(step.num_tokens)
            if needed > pages_to_begin:
                may_begin, kept_out = False, (index, needed - pages_to_begin)
                continue
            pages_to_begin -= needed
        chunks.append((index, num_tokens))
        pages -= needed
        room -= num_tokens * step.num_rows
        if not step.decodes:
            prefill_room -= num_tokens * step.num_rows
            may_be_one_by_one = False
    return SchedulerOutput(tuple(chunks), kept_out=kept_out)


def is_training_due(*, inference_seconds: float, training_seconds: float, share: float) -> bool:
    """Whether training has had less than its share of the time in which both were wanted."""
    return training_seconds < share * (inference_seconds + training_seconds)


def batching_delay(expected: Sequence[float], *, num_ready: int, now: float, pass_seconds: float) -> float:
    """How long the steps that are ready should wait for others, which are expected at these times.

    Whoever comes just after a pass has begun waits until it ends; whoever is ready loses what the pass is delayed. A
    pass for all costs what a pass for some costs, so the pass begins when the sum of all these waits is the least;
    what is missed counts several times, because those who are computed together now will come together again. Somebody
    who is late already will take about as long again as he is late.
    """
    waits = sorted(wait for wait in (abs(time - now) for time in expected) if wait < pass_seconds)
    best, least = 0.0, GROUPING_WEIGHT * sum(pass_seconds - wait for wait in waits)
    for index, wait in enumerate(waits):
        delayed = num_ready * wait + sum(wait - each for each in waits[:index])
        missed = sum(pass_seconds - each + wait for each in waits[index + 1 :] if each > wait)
        cost = delayed + GROUPING_WEIGHT * missed
        if cost < least:
            best, least = wait, cost
    return best


@dataclass(frozen=True)
class PassTimeModel:
    """How long passes take here: one that only decodes, and each token of a prefill beside."""

    decode_seconds: float
    prefill_token_seconds: float

    def prefill_tokens(self, share: float) -> int:
        """How many tokens of prefills take `share` of a pass's time beside those who decode."""
        seconds = self.decode_seconds * share / (1 - share)
        return max(MIN_PREFILL_TOKENS, int(seconds / self.prefill_token_seconds))

    def updated(self, *, num_prefill_tokens: int, seconds: float) -> PassTimeModel:
        """What is believed after one more pass."""
        if not num_prefill_tokens:
            return PassTimeModel(_moved(self.decode_seconds, seconds), self.prefill_token_seconds)
        if num_prefill_tokens < MIN_PREFILL_TOKENS:
            return self
        beside = max(seconds - self.decode_seconds, 0.1 * seconds)
        return PassTimeModel(self.decode_seconds, _moved(self.prefill_token_seconds, beside / num_prefill_tokens))


def _moved(believed: float, seen: float) -> float:
    return (1 - SMOOTHING) * believed + SMOOTHING * seen
