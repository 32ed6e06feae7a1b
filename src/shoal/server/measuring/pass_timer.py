"""Times the passes that a server computes, on the blocks that it holds, in a few seconds."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from shoal.model.body import Body
from shoal.policy.machines.speed_profile import SESSION_TOKENS, SpeedProfile
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.pages import pages_for
from shoal.server.kv.session_cache import Growth
from shoal.server.measured_speed import Measurement, PassRuns, Runs, cached_profile
from shoal.server.speed_watch import MEASURED_PREFILL_TOKENS
from shoal.spans import Span

PAST_TOKENS = 64
"""Tokens in the cache of the session that decodes alone: a short past, as most sessions begin with."""
REPEATS = 5
"""Runs of one measurement: enough for a median that one slow run does not change."""
BATCH_SIZES = (8, 32, 128, 512)
"""Sessions that decode together, if there are pages for them. Times between them are interpolated."""
BATCH_PAST_TOKENS = SESSION_TOKENS // 2
"""Tokens in the cache of each of these sessions: those of a session in the middle of its life."""
BATCH_REPEATS = 3
"""Runs of one such pass, which takes longer than one of a single session."""
SHARED_PAGES = 512
"""The pages that hold the pasts of these sessions: more than processors' caches hold, and little to fill."""
MIN_GAIN = 1.1
"""No larger batch is timed if the last one was not this many times faster, for each session, than the one before."""
MAX_BATCH_SECONDS = 4.0
"""No larger batch is timed if all batches together would take longer, should it take twice as long as the last."""
MAX_RUN_SECONDS = 2.0
"""A pass that took this long is not run again, once it was run `MIN_REPEATS` times: the machine is slow or busy."""
MIN_REPEATS = 2
"""Runs of the slowest pass."""


def profile_of(
    body: Body,
    compute: Pass,
    *,
    key: str,
    num_pages: int,
    state_pages: int = 0,
    check: Callable[[], None] = lambda: None,
) -> SpeedProfile:
    """How fast blocks are on this machine: from the disk cache if it has `key`, or measured now on those of the body.

    The cache of the body has `num_pages` pages, and the states of a sequence count as `state_pages` of them. `check` is
    called between runs and may raise. It is called on the compute thread.
    """
    timer = PassTimer(body, compute, num_pages=num_pages, state_pages=state_pages, check=check)
    return cached_profile(key, timer, num_blocks=len(body.span))


class PassTimer:
    """Times the passes of a body once each time that it is called."""

    def __init__(
        self, body: Body, compute: Pass, *, num_pages: int, check: Callable[[], None], state_pages: int = 0
    ) -> None:
        self._body = body
        self._compute = compute
        self._num_pages = num_pages
        self._state_pages = state_pages
        self._check = check
        self._spans = [body.span, Span(body.span.start, body.span.start + 1)][: len(body.span)]

    def __call__(self) -> Measurement:
        past = min(PAST_TOKENS, self._num_pages * PAGE_TOKENS - 1)
        num_tokens = min(MEASURED_PREFILL_TOKENS, self._num_pages * PAGE_TOKENS)
        self._run([self._chunk(self._body.span, 0, 1)])  # makes the states that the next passes begin with
        for _ in range(2):  # the first passes also allocate and compile
            self._run([self._chunk(self._body.span, past, 1)])
        decode = self._runs(lambda span: [self._chunk(span, past, 1)], REPEATS)
        prefill = self._runs(lambda span: [self._chunk(span, 0, num_tokens)], REPEATS)
        return Measurement(decode, prefill, num_tokens, ((1, decode), *self._larger_batches(decode.whole)))

    def _larger_batches(self, alone: Runs) -> Iterator[tuple[int, PassRuns]]:
        """The times of ever larger batches, as long as there are pages for them and they are worth it.

        The first is always timed: without it, a server would seem to gain nothing by computing sessions together.
        """
        seconds = each = statistics.median(alone.seconds)
        spent = 0.0
        for size in BATCH_SIZES:
            is_too_long = spent > 0 and spent + 2 * seconds * (BATCH_REPEATS + 1) > MAX_BATCH_SECONDS
            if is_too_long or self._num_pages < (2 + self._state_pages) * size:
                return
            past = min(BATCH_PAST_TOKENS, (self._num_pages - size) * PAGE_TOKENS)
            self._run(self._batch(self._body.span, size=size, num_computed_tokens=past, is_first=True))
            runs = self._runs(functools.partial(self._batch, size=size, num_computed_tokens=past), BATCH_REPEATS)
            yield size, runs
            before, seconds = each, statistics.median(runs.whole.seconds)
            each, spent = seconds / size, spent + seconds * (BATCH_REPEATS + 1)
            if each * MIN_GAIN > before:
                return

    def _runs(self, chunks: Callable[[Span], list[Chunk]], repeats: int) -> PassRuns:
        whole, *one = [self._runs_through(chunks, span, repeats) for span in self._spans]
        return PassRuns(len(self._body.span), whole, *one)

    def _runs_through(self, chunks: Callable[[Span], list[Chunk]], span: Span, repeats: int) -> Runs:
        busy, start = time.thread_time(), time.perf_counter()
        seconds: list[float] = []
        while len(seconds) < MIN_REPEATS or (len(seconds) < repeats and sum(seconds) < MAX_RUN_SECONDS):
            seconds.append(self._run(chunks(span)))
        cpu_fraction = (time.thread_time() - busy) / (time.perf_counter() - start)
        return Runs(tuple(seconds), cpu_fraction if self._body.backbone.device.type == "cpu" else None)

    def _run(self, chunks: list[Chunk]) -> float:
        self._check()
        start = time.perf_counter()
        *_, last = [_unless_it_failed(output) for output in self._compute(chunks)]
        last.cpu()  # waits for the device
        return time.perf_counter() - start

    def _chunk(self, span: Span, num_computed_tokens: int, num_tokens: int) -> Chunk:
        """The next tokens of a session with a past."""
        pages = tuple(range(min(self._num_pages, pages_for(num_computed_tokens + num_tokens))))
        return Chunk(
            span=span,
            hidden_BTD=self._inputs(num_tokens),
            positions_BT=None,
            mask_BS=None,
            num_computed_tokens=num_computed_tokens,
            pages=(pages,),
            growth=Growth((), pages),
            slots=self._slots(0, 1),
        )

    def _batch(self, span: Span, *, size: int, num_computed_tokens: int, is_first: bool = False) -> list[Chunk]:
        """The next token of each of several sessions, which write into pages of their own and share pages to read.

        The pages are cleared before the first pass: they may hold anything.
        """
        num_past = num_computed_tokens // PAGE_TOKENS
        shared = range(size, min(self._num_pages, size + max(SHARED_PAGES, num_past)))
        inputs_BTD = self._inputs(size).transpose(0, 1)
        return [
            Chunk(
                span=span,
                hidden_BTD=inputs_BTD[row : row + 1],
                positions_BT=None,
                mask_BS=None,
                num_computed_tokens=num_past * PAGE_TOKENS,
                pages=((*(shared[(row * num_past + page) % len(shared)] for page in range(num_past)), row),),
                growth=self._first_growth(row, shared) if is_first else Growth((), ()),
                slots=self._slots(row, row + 1),
            )
            for row in range(size)
        ]

    def _first_growth(self, row: int, shared: Sequence[int]) -> Growth:
        pages = (row, *shared) if row == 0 else (row,)
        return Growth((), pages, new_slots=self._slots(row, row + 1))

    def _slots(self, start: int, stop: int) -> tuple[int, ...]:
        """The slots of sequences with these numbers, if the body keeps states."""
        return tuple(range(start, stop)) if self._state_pages else ()

    def _inputs(self, num_tokens: int) -> torch.Tensor:
        """Random inputs [1, T, D]: equal ones would all use the same experts."""
        backbone = self._body.backbone
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, num_tokens, backbone.config.hidden_size, generator=generator).to(backbone.dtype)


def _unless_it_failed(output: torch.Tensor | Exception) -> torch.Tensor:
    if isinstance(output, Exception):
        raise output
    return output
