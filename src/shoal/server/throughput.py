"""How fast a server is, measured on the blocks that it holds, with the passes that it computes, in a few seconds.

A measurement of a quiet machine is kept on disk for some days. It depends on the weights, the machine and the versions,
which are its key, and not on the start of the server.
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
from shoal.model.weights import disk_cache
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.pages import pages_for
from shoal.server.kv.session_cache import Growth
from shoal.server.speed_watch import MEASURED_PREFILL_TOKENS, Speeds

log = logging.getLogger(__name__)

PAST_TOKENS = 64
"""Tokens in the cache of the session that decodes: a short past, as most sessions have."""
REPEATS = 5
"""Runs of one measurement: enough for a median that one slow run does not change."""
MAX_ROUNDS = 3
"""The most measurements of a busy machine. More would delay the start, and the machine may stay busy."""
MAX_SECONDS = 10.0
"""No further measurement begins after this long, even if the machine is busy: slow machines are measured once."""
CACHED_SECONDS = 7 * 24 * 3600.0
"""The age at which a measurement on disk is made again: drivers and firmware change without a trace in its key."""
MAX_SPREAD = 1.5
"""On a quiet machine the median of the runs is at most this many times the fastest run."""
MIN_CPU_FRACTION = 0.6
"""On a quiet machine the compute thread runs for at least this fraction of the time. Otherwise other programs run."""


@dataclass(frozen=True)
class Runs:
    """The seconds of several runs of one pass, and the fraction of that time for which their thread had a processor.

    `cpu_fraction` is `None` on other devices than processors, where it says nothing.
    """

    seconds: tuple[float, ...]
    cpu_fraction: float | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether the machine seems to have done nothing else."""
        is_steady = statistics.median(self.seconds) <= MAX_SPREAD * min(self.seconds)
        return is_steady and (self.cpu_fraction is None or self.cpu_fraction >= MIN_CPU_FRACTION)


@dataclass(frozen=True)
class Measurement:
    """Runs that decode one token, and runs that read a prompt of `num_tokens` tokens."""

    decode: Runs
    prefill: Runs
    num_tokens: int

    @property
    def is_quiet(self) -> bool:
        """Whether the machine seems to have done nothing else."""
        return self.decode.is_quiet and self.prefill.is_quiet

    @property
    def seconds(self) -> float:
        """How long all runs took."""
        return sum(self.decode.seconds) + sum(self.prefill.seconds)

    @property
    def speeds(self) -> Speeds:
        """The speeds of the median runs."""
        return Speeds(
            1 / statistics.median(self.decode.seconds), self.num_tokens / statistics.median(self.prefill.seconds)
        )


def best_of(measurements: Sequence[Measurement]) -> Speeds:
    """The best speeds of several measurements: a busy machine can only look slower than it is."""
    speeds = [each.speeds for each in measurements]
    return Speeds(max(each.decode for each in speeds), max(each.prefill for each in speeds))


def speed_key(body: Body, *, weights: str) -> str:
    """The key of a measurement: all that it depends on. `weights` names the weights and their quantization."""
    device = body.backbone.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return (
        f"speed of {weights} blocks {body.span} in {body.backbone.dtype} on {device.type} {machine} with "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this machine's processor, or at least its architecture."""
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
    key: str,
    num_pages: int,
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.time,
) -> Speeds:
    """How fast the blocks are on this machine: from the disk cache if it has `key`, or measured now.

    The cache of the body has `num_pages` pages. `check` is called between runs and may raise; `clock` gives the time of
    day in seconds. It is called on the compute thread.
    """
    return cached_speeds(key, lambda: _measure(body, compute, num_pages=num_pages, check=check), clock=clock)


def cached_speeds(key: str, measure: Callable[[], Measurement], *, clock: Callable[[], float] = time.time) -> Speeds:
    """The speeds on disk, unless older than `CACHED_SECONDS`; else measured, and kept if the machine is quiet."""
    match disk_cache.load(key):
        case {"decode": float(decode), "prefill": float(prefill), "measured_at": float(measured_at)} if (
            decode > 0 and prefill > 0 and 0 <= clock() - measured_at < CACHED_SECONDS
        ):
            return Speeds(decode, prefill)
    measurements: list[Measurement] = []
    while len(measurements) < MAX_ROUNDS and sum(each.seconds for each in measurements) < MAX_SECONDS:
        measurements.append(measure())
        if measurements[-1].is_quiet:
            speeds = measurements[-1].speeds
            disk_cache.store(key, {"decode": speeds.decode, "prefill": speeds.prefill, "measured_at": clock()})
            return speeds
    log.info("the machine is busy: the server will measure its speed again at its next start")
    return best_of(measurements)


def _measure(body: Body, compute: Pass, *, num_pages: int, check: Callable[[], None]) -> Measurement:
    def run(num_computed_tokens: int, num_tokens: int) -> float:
        check()
        chunk = _chunk(body, num_computed_tokens, num_tokens, num_pages)
        start = time.perf_counter()
        (output,) = compute([chunk])
        if isinstance(output, Exception):
            raise output
        output.cpu()  # waits for the device
        return time.perf_counter() - start

    def runs(num_computed_tokens: int, num_tokens: int) -> Runs:
        busy, start = time.thread_time(), time.perf_counter()
        seconds = tuple(run(num_computed_tokens, num_tokens) for _ in range(REPEATS))
        cpu_fraction = (time.thread_time() - busy) / (time.perf_counter() - start)
        return Runs(seconds, cpu_fraction if body.backbone.device.type == "cpu" else None)

    num_computed_tokens = min(PAST_TOKENS, num_pages * PAGE_TOKENS - 1)
    num_tokens = min(MEASURED_PREFILL_TOKENS, num_pages * PAGE_TOKENS)
    for _ in range(2):  # the first passes also allocate and compile
        run(num_computed_tokens, 1)
    return Measurement(runs(num_computed_tokens, 1), runs(0, num_tokens), num_tokens)


def _chunk(body: Body, num_computed_tokens: int, num_tokens: int, num_pages: int) -> Chunk:
    """The next tokens of a session whose inputs are zeros, which take as long as any others."""
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
