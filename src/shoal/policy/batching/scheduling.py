"""Which tokens an engine computes next, decided from a view of the requests that wait.

A pass takes tokens of many sessions. All decoding steps come first: a person waits for each of their tokens, and the
weights are read once for all of them. The rest of the pass goes to prefills in order of arrival. Prefills are cut, so
that a pass with a part of a long prompt takes little longer than a pass without. Towards the end of a prompt the parts
get smaller: each of their tokens attends to more (`shoal.policy.batching.pass_times`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_times import MIN_PREFILL_TOKENS, PassLoad, PassTimeModel, PrefillBudget
from shoal.policy.batching.preemption import Holder

DECODE_TOKENS = 8
"""The most new tokens a sequence of a decoding step: a person waits for one token, or for a few checked guesses."""
LATE_SECONDS = 1e-3
"""A step that is due comes within this time at the earliest: sessions that were answered together come one by one."""
GROUPING_WEIGHT = 4
"""How many times a step counts that misses a pass: steps that are computed together come together again next time."""


@dataclass(frozen=True)
class RequestView:
    """A step that waits: `num_tokens` more tokens of each of `num_rows` sequences, behind `num_past` that are cached.

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
    num_past: int = 0

    @property
    def decodes(self) -> bool:
        """Whether it is a few next tokens of a session that runs, and not a long prompt."""
        return self.running and self.num_tokens <= DECODE_TOKENS

    def work(self, num_tokens: int) -> PassLoad:
        """The work that `num_tokens` of its tokens of each sequence are in a pass."""
        return PassLoad.of(num_rows=self.num_rows, num_tokens=num_tokens, num_past=self.num_past, decodes=self.decodes)


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
    prefill: PrefillBudget,
    pages_kept_free: int = 0,
) -> SchedulerOutput:
    """The next pass, of at most `max_num_batched_tokens` tokens, with as many of prefills as `prefill` has time for.

    The `requests` are in order of arrival. No request waits for ever: a step that is too large for a pass gets a pass
    of its own, and the first prefill is in every pass, with at least one token of each row, or all of it if it is
    unsplittable. A session begins only when there are pages for its whole first step beside the pages that running
    sessions need and `pages_kept_free`, and later sessions do not begin before it.
    """
    chunks: list[tuple[int, int]] = []
    room, pages = max_num_batched_tokens, num_free_pages
    needed_by_running = sum(step.num_pages(step.num_tokens) for step in requests if step.running)
    pages_to_begin = num_free_pages - needed_by_running - pages_kept_free
    may_begin = may_be_one_by_one = True
    kept_out: tuple[int, int] | None = None
    for index in sorted(range(len(requests)), key=lambda each: not requests[each].decodes):
        step = requests[index]
        if not step.running and not may_begin:
            continue
        most = step.num_tokens if step.most_tokens is None else step.most_tokens
        num_tokens = min(most, max(0, room) // step.num_rows)  # a pass of its own may exceed the limit
        if not step.decodes:
            num_tokens = min(num_tokens, prefill.num_tokens(num_rows=step.num_rows, num_past=step.num_past))
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
            prefill = prefill.without(num_rows=step.num_rows, num_tokens=num_tokens, num_past=step.num_past)
            may_be_one_by_one = False
    return SchedulerOutput(tuple(chunks), kept_out=kept_out)


def prefill_budget(
    pass_time: PassTimeModel,
    requests: Sequence[RequestView],
    *,
    limits: Limits,
    is_decoding: bool,
    next_in: float | None = None,
) -> PrefillBudget:
    """What prefills may take in the next pass, so that sessions that decode do not wait for them.

    `is_decoding` says whether sessions decode, although none of their steps may be among the `requests`. Then the next
    one is expected in `next_in` seconds, and a pass without any ends by then if that can be.
    """
    decoding = PassLoad.total(request.work(request.num_tokens) for request in requests if request.decodes)
    if not is_decoding and not decoding.num_decoding:
        return pass_time.alone(max_num_batched_tokens=limits.max_num_batched_tokens)
    budget = pass_time.beside(decoding, share=limits.prefill)
    if decoding.num_decoding or next_in is None:
        return budget
    return replace(budget, seconds=min(budget.seconds, next_in - pass_time.decoding.fixed))


def shortest_prefill_seconds(pass_time: PassTimeModel, requests: Sequence[RequestView]) -> float:
    """How long a pass takes that has a page of one of these prefills, of the one for which that takes least."""

    def first_page(request: RequestView) -> PassLoad:
        return request.work(min(request.num_tokens, max(1, MIN_PREFILL_TOKENS // request.num_rows)))

    return min((pass_time.seconds_of(first_page(each)) for each in requests if not each.decodes), default=0.0)


def seconds_to_next(expected: Sequence[float], *, now: float) -> float | None:
    """In how many seconds the first of the steps comes that are `expected` at these times; `None` if there are none."""
    return min((_seconds_until(time, now) for time in expected), default=None)


def _seconds_until(expected: float, now: float) -> float:
    """When a step comes. One that is late by t is expected after another t, or `LATE_SECONDS` if that is longer."""
    return expected - now if expected > now else max(now - expected, LATE_SECONDS)


def is_training_due(*, inference_seconds: float, training_seconds: float, share: float) -> bool:
    """Whether training has had less than its share of the time in which both training and inference had requests."""
    return training_seconds < share * (inference_seconds + training_seconds)


def batching_delay(
    expected: Sequence[float],
    *,
    num_ready: float,
    now: float,
    pass_seconds: float,
    weights: Sequence[float] | None = None,
) -> float:
    """Seconds that the `num_ready` steps should wait for other steps, which are `expected` at these times.

    A step that arrives just after a pass has begun waits until the pass ends, and the steps that are ready lose the
    time by which the pass is delayed. A pass takes about as long for all as for some, so it begins when the sum of all
    these waits is least. A step that misses the pass counts `GROUPING_WEIGHT` times. With `weights`, the expected steps
    count by these, and `num_ready` is the sum of the weights of those that are ready
    (`shoal.policy.batching.compute_account.client_weights`).
    """
    each = [1.0] * len(expected) if weights is None else weights
    moments = ((_seconds_until(time, now), weight) for time, weight in zip(expected, each, strict=True))
    waits = sorted(moment for moment in moments if moment[0] < pass_seconds)
    total, num_all = sum(wait * weight for wait, weight in waits), sum(weight for _, weight in waits)
    before, num_before = 0.0, 0.0
    best, least = 0.0, GROUPING_WEIGHT * (num_all * pass_seconds - total)
    for wait, weight in waits:
        delayed = num_ready * wait + num_before * wait - before
        before += wait * weight
        num_before += weight
        missed = (num_all - num_before) * (pass_seconds + wait) - (total - before)
        cost = delayed + GROUPING_WEIGHT * missed
        if cost < least:
            best, least = wait, cost
    return best
