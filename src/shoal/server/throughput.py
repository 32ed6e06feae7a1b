"""How fast a server is: measured on the blocks that it holds, the way it computes them, in a few seconds at most.

What was measured while the machine was quiet is kept on disk for some days: it changes with the weights, the machine
and the versions, not with every start.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.model.body import Body
from shoal.model.weights import disk_cache as memo
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.pages import pages_for
from shoal.server.kv.session_cache import Growth
from shoal.server.speed_watch import MEASURED_PREFILL, Speeds

log = logging.getLogger(__name__)

PAST_TOKENS = 64
REPEATS = 5
ROUNDS = 3
MOST_SECONDS = 10.0
"""While the machine looks busy all is measured again, so often in all, until it has taken so long."""
KEPT_SECONDS = 7 * 24 * 3600.0
MAX_SPREAD = 1.5
"""On a quiet machine the median of several runs is at most so many times the fastest."""
LEAST_ATTENTION = 0.6
"""On a quiet machine the compute thread is given at least this part of the time. Elsewhere, others have it."""


@dataclass(frozen=True)
class Runs:
    """What some runs of the same took, in seconds, and how much of that the processor spent on their thread.

    `attention` is `None` where that says nothing: on other devices than processors.
    """

    seconds: tuple[float, ...]
    attention: float | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else seems to have kept the machine busy."""
        steady = statistics.median(self.seconds) <= MAX_SPREAD * min(self.seconds)
        return steady and (self.attention is None or self.attention >= LEAST_ATTENTION)


@dataclass(frozen=True)
class Measurement:
    """Runs of single tokens, and of prompts of `num_tokens`."""

    decode: Runs
    prefill: Runs
    num_tokens: int

    @property
    def is_quiet(self) -> bool:
        return self.decode.is_quiet and self.prefill.is_quiet

    @property
    def seconds(self) -> float:
        """How long it took."""
        return sum(self.decode.seconds) + sum(self.prefill.seconds)

    @property
    def speeds(self) -> Speeds:
        return Speeds(
            1 / statistics.median(self.decode.seconds), self.num_tokens / statistics.median(self.prefill.seconds)
        )


def best_of(measurements: Sequence[Measurement]) -> Speeds:
    """What several measurements on a busy machine say: nothing computes faster than it can."""
    speeds = [each.speeds for each in measurements]
    return Speeds(max(each.decode for each in speeds), max(each.prefill for each in speeds))


def name_of(body: Body, *, weights: str) -> str:
    """What the speed depends on; `weights` names the blocks' weights, and how they are quantized."""
    device = body.backbone.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return (
        f"speed of {weights} blocks {body.span} in {body.backbone.dtype} on {device.type} {machine} with "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this machine's processor, as far as the system tells it."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in lines if key.strip() in ("model name", "Model", "Hardware")]
    return names[0] if names else platform.processor() or platform.machine()


def speeds_of(
    body: Body,
    compute: Pass,
    *,
    fact: str,
    num_pages: int,
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.time,
) -> Speeds:
    """How fast the blocks are here: as it was kept on disk under the name `fact`, or measured now.

    `check` is called between runs, and may raise.
    """
    return speeds_kept(fact, lambda: _measure(body, compute, num_pages=num_pages, check=check), clock=clock)


def speeds_kept(fact: str, measure: Callable[[], Measurement], *, clock: Callable[[], float] = time.time) -> Speeds:
    """The speeds kept under this name, unless they are too old; else measured, and kept if the machine is quiet."""
    match memo.recall(fact):
        case {"decode": float(decode), "prefill": float(prefill), "measured_at": float(measured_at)} if (
            decode > 0 and prefill > 0 and 0 <= clock() - measured_at < KEPT_SECONDS
        ):
            return Speeds(decode, prefill)
    measurements: list[Measurement] = []
    while len(measurements) < ROUNDS and sum(each.seconds for each in measurements) < MOST_SECONDS:
        measurements.append(measure())
        if measurements[-1].is_quiet:
            speeds = measurements[-1].speeds
            memo.keep(fact, {"decode": speeds.decode, "prefill": speeds.prefill, "measured_at": clock()})
            return speeds
    log.info("the machine is busy: its speed will be measured again at the next start")
    return best_of(measurements)


def _measure(body: Body, compute: Pass, *, num_pages: int, check: Callable[[], None]) -> Measurement:
    def run(num_computed_tokens: int, num_tokens: int) -> float:
        check()
        chunk = _chunk(body, num_computed_tokens, num_tokens, num_pages)
        start = time.perf_counter()
        (output,) = compute([chunk])
        if isinstance(output, Exception):
            raise output
        output.cpu()  # which waits for it
        return time.perf_counter() - start

    def runs(num_computed_tokens: int, num_tokens: int) -> Runs:
        busy, start = time.thread_time(), time.perf_counter()
        seconds = tuple(run(num_computed_tokens, num_tokens) for _ in range(REPEATS))
        attention = (time.thread_time() - busy) / (time.perf_counter() - start)
        return Runs(seconds, attention if body.backbone.device.type == "cpu" else None)

    num_computed_tokens = min(PAST_TOKENS, num_pages * PAGE_TOKENS - 1)
    num_tokens = min(MEASURED_PREFILL, num_pages * PAGE_TOKENS)
    for _ in range(2):  # the first passes pay for what happens only once
        run(num_computed_tokens, 1)
    return Measurement(runs(num_computed_tokens, 1), runs(0, num_tokens), num_tokens)


def _chunk(body: Body, num_computed_tokens: int, num_tokens: int, num_pages: int) -> Chunk:
    """Tokens of a session whose past is nothing but zeros: they take as long as any others."""
    backbone = body.backbone
    pages = tuple(range(min(num_pages, pages_for(num_computed_tokens + num_tokens))))
    cache = None
    if not body.family.packable:
        cache = body.new_cache()
        if num_computed_tokens:
            past = torch.zeros(
                1, num_computed_tokens, backbone.config.hidden_size, dtype=backbone.dtype, device=backbone.device
            )
            body(past, cache=cache)
    return Chunk(
        span=body.span,
        hidden_BTD=torch.zeros(1, num_tokens, backbone.config.hidden_size, dtype=backbone.dtype),
        positions_BT=None,
        mask_BS=None,
        num_computed_tokens=num_computed_tokens,
        pages=(pages,),
        growth=Growth((), pages),
        cache=cache,
    )
