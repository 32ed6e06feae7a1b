"""Which tokens an engine computes next, decided from a view of the requests that wait.

A pass takes tokens of many sessions. All decoding steps come first: a person waits for each of their tokens, and the
weights are read once for all of them. The rest of the pass goes to prefills in order of arrival. Prefills are cut, so
that a pass with a part of a long prompt takes little longer than a pass without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.policy.batching.preemption import Holder

DECODE_TOKENS = 8
"""The most new tokens a sequence of a decoding step: a person waits for one token, or for a few checked guesses."""
MIN_PREFILL_TOKENS = 16
"""Prefill tokens that every pass may take, so that prefills go on beside decoding. Fewer are too few to be timed."""
GROUPING_WEIGHT = 4
"""How many times a step counts that misses a pass: steps that are computed together come together again next time."""
SMOOTHING = 0.2
"""The weight of a new measurement in a moving average."""


@dataclass(frozen=True)
class RequestView:
    """A step that waits: `num_tokens` more tokens of each of `num_rows` sequences.

    `num_pages(n)` is how many free pages it takes to compute n tokens of each sequence. The request is `running` if its
    session holds pages already. An `unsplittable` request is computed in one pass; of others, a pass computes at most
    `most_tokens` tokens of each sequence. It came at `arrived_at`, in seconds. `session` is what the server knows of
    its session.
    """

    num_rows: int
    num_tokens: int
    running: bool
    num_pages: Callable[[int], int]
    unsplittable: bool = False
    arrived_at: float = 0.0
    session: Holder | None = None
    most_tokens: int | None = None

    @property
    def decodes(self) -> bool:
        """Whether it is a few next tokens of a session that runs, and not a long prompt."""
        return self.running and self.num_tokens <= DECODE_TOKENS


@dataclass(frozen=True)
class SchedulerOutput:
    """The next pass: `chunks` are pairs of a request's index and how many tokens of each of its rows to compute.

    If `short_of_pages`, a running session cannot go on until another session is preempted. `kept_out` is the index of
    the first request that waits for pages to begin, and how many pages are missing.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    short_of_pages: bool = False
    kept_out: tuple[int, int] | None = None


def schedule(
    requests: Sequence[RequestView],
    *,
    num_free_pages: int,
    max_num_batched_tokens: int,
    prefill_tokens: int,
    pages_kept_free: int = 0,
) -> SchedulerOutput:
    """The next pass, of at most `max_num_batched_tokens` tokens, of which at most `prefill_tokens` are of prefills.

    The `requests` are in order of arrival. No request waits for ever: a step that is too large for a pass gets a pass
    of its own, and the first prefill is in every pass, with at least one token of each row, or all of it if it is
    unsplittable. A session begins only when there are pages for its whole first step beside the pages that running
    sessions need and `pages_kept_free`, and later sessions do not begin before it.
    """
    chunks: list[tuple[int, int]] = []
    room, prefill_room, pages = max_num_batched_tokens, prefill_tokens, num_free_pages
    needed_by_running = sum(step.num_pages(step.num_tokens) for step in requests if step.running)
    pages_to_begin = num_free_pages - needed_by_running - pages_kept_free
    may_begin = may_be_one_by_one = True
    kept_out: tuple[int, int] | None = None
    for index in sorted(range(len(requests)), key=lambda each: not requests[each].decodes):
        step = requests[index]
        if not step.running and not may_begin:
            continue
        left = max(0, room if step.decodes else min(room, prefill_room))  # a pass of its own may exceed the limit
        most = step.num_tokens if step.most_tokens is None else step.most_tokens
        num_tokens = min(most, left // step.num_rows)
        if step.unsplittable and num_tokens < step.num_tokens:
            num_tokens = 0
        least = step.num_tokens if step.unsplittable else 1
        if not num_tokens and may_be_one_by_one and (not chunks or not step.decodes or step.num_rows * least <= room):
            num_tokens = least
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


@dataclass(frozen=True)
class Rhythm:
    """When a session's last step came, and how long after the one before, in seconds."""

    arrived_at: float | None = None
    period: float | None = None

    def after_arrival(self, now: float, *, decodes: bool) -> Rhythm:
        """With one more step. Only steps that decode one token tell when the next one comes."""
        return Rhythm(now, now - self.arrived_at if decodes and self.arrived_at is not None else None)

    @property
    def expected_at(self) -> float | None:
        """When the next step comes if the session keeps its pace."""
        return None if self.arrived_at is None or self.period is None else self.arrived_at + self.period


def is_training_due(*, inference_seconds: float, training_seconds: float, share: float) -> bool:
    """Whether training has had less than its share of the time in which both training and inference had requests."""
    return training_seconds < share * (inference_seconds + training_seconds)


def batching_delay(expected: Sequence[float], *, num_ready: int, now: float, pass_seconds: float) -> float:
    """Seconds that the `num_ready` steps should wait for other steps, which are `expected` at these times.

    A step that arrives just after a pass has begun waits until the pass ends, and the steps that are ready lose the
    time by which the pass is delayed. A pass takes about as long for all as for some, so it begins when the sum of all
    these waits is least. A step that misses the pass counts `GROUPING_WEIGHT` times. A session that is late by t is
    expected after another t.
    """
    waits = sorted(wait for wait in (abs(time - now) for time in expected) if wait < pass_seconds)
    total, before = sum(waits), 0.0
    best, least = 0.0, GROUPING_WEIGHT * (len(waits) * pass_seconds - total)
    for index, wait in enumerate(waits):
        delayed = num_ready * wait + index * wait - before
        before += wait
        missed = (len(waits) - index - 1) * (pass_seconds + wait) - (total - before)
        cost = delayed + GROUPING_WEIGHT * missed
        if cost < least:
            best, least = wait, cost
    return best


@dataclass(frozen=True)
class PassTimeModel:
    """How long passes take on this machine: the seconds of a decoding pass, and what each prefill token adds."""

    decode_seconds: float
    prefill_token_seconds: float

    def prefill_tokens(self, share: float) -> int:
        """How many prefill tokens take `share` of the time of a pass that decodes too."""
        seconds = self.decode_seconds * share / (1 - share)
        return max(MIN_PREFILL_TOKENS, int(seconds / self.prefill_token_seconds))

    def updated(self, *, num_prefill_tokens: int, seconds: float) -> PassTimeModel:
        """The model after one more pass, which had `num_prefill_tokens` and took `seconds`."""
        if not num_prefill_tokens:
            return PassTimeModel(_averaged(self.decode_seconds, seconds), self.prefill_token_seconds)
        if num_prefill_tokens < MIN_PREFILL_TOKENS:
            return self
        beside = max(seconds - self.decode_seconds, 0.1 * seconds)
        return PassTimeModel(self.decode_seconds, _averaged(self.prefill_token_seconds, beside / num_prefill_tokens))


def _averaged(believed: float, seen: float) -> float:
    return (1 - SMOOTHING) * believed + SMOOTHING * seen
