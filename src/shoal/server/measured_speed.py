"""How fast a server is, by the passes that were timed on the blocks that it holds (`shoal.server.measuring`).

A pass is timed through all blocks and through one of them, so that the time of any number of blocks is known
(`shoal.policy.machines.speed_profile`). A measurement of a quiet machine is kept on disk for some days. It depends on
the weights, the machine and the versions, which are its key, and neither on the start of the server nor on which blocks
of the model it holds: they count as alike. What this machine measured last is found by the weights and their form
alone (`last_profile`), without PyTorch, which this module imports only to name the machine and to measure.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from shoal.host.computer import processor_name
from shoal.model.weights import disk_cache
from shoal.policy.machines.speed_profile import BlockTime, SpeedProfile
from shoal.spans import Span

if TYPE_CHECKING:
    import torch

    from shoal.server.speed_watch import Speeds

log = logging.getLogger(__name__)

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
_ON = " on "
"""In a key, what stands between the form of the weights and the machine."""


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
class PassRuns:
    """Runs of one pass through `num_blocks` blocks, `whole`, and through the first `one` of them, if there are more."""

    num_blocks: int
    whole: Runs
    one: Runs | None = None

    @property
    def time(self) -> BlockTime:
        """The time of the median runs."""
        whole = statistics.median(self.whole.seconds)
        one = whole if self.one is None else statistics.median(self.one.seconds)
        return BlockTime.between(one=one, whole=whole, num_blocks=self.num_blocks)

    @property
    def all_runs(self) -> tuple[Runs, ...]:
        """Both kinds of runs, or the one that there is."""
        return (self.whole,) if self.one is None else (self.whole, self.one)


@dataclass(frozen=True)
class Measurement:
    """Runs that decode one token of one session, and of several, and that read a prompt of `num_tokens` tokens."""

    decode: PassRuns
    prefill: PassRuns
    num_tokens: int
    batches: tuple[tuple[int, PassRuns], ...]

    @property
    def _runs(self) -> Iterator[Runs]:
        for each in (self.decode, self.prefill, *(runs for _, runs in self.batches)):
            yield from each.all_runs

    @property
    def is_quiet(self) -> bool:
        """Whether the machine seems to have done nothing else."""
        return all(runs.is_quiet for runs in self._runs)

    @property
    def seconds(self) -> float:
        """How long all runs took."""
        return sum(sum(runs.seconds) for runs in self._runs)

    @property
    def profile(self) -> SpeedProfile:
        """The times of the median runs."""
        batches = tuple((size, runs.time) for size, runs in self.batches)
        return SpeedProfile(self.decode.num_blocks, self.decode.time, self.prefill.time, self.num_tokens, batches)


def best_of(measurements: Sequence[Measurement]) -> SpeedProfile:
    """The shortest times of several measurements: a busy machine can only look slower than it is."""
    profiles = [each.profile for each in measurements]
    num_blocks = profiles[0].num_blocks

    def best(times: Sequence[BlockTime]) -> BlockTime:
        return min(times, key=lambda time: time.seconds(num_blocks))

    of_size: dict[int, list[BlockTime]] = {}
    for profile in profiles:
        for size, time_of_batch in profile.batches:
            of_size.setdefault(size, []).append(time_of_batch)
    return replace(
        profiles[0],
        decode=best([each.decode for each in profiles]),
        prefill=best([each.prefill for each in profiles]),
        batches=tuple((size, best(times)) for size, times in sorted(of_size.items())),
    )


def speeds_in(profile: SpeedProfile, span: Span) -> Speeds:
    """How fast a server is that holds this span."""
    from shoal.server.speed_watch import Speeds

    return Speeds(profile.decode_speed(len(span)), profile.prefill_speed(len(span)))


def machine_key(*, weights: str, dtype: torch.dtype, device: torch.device) -> str:
    """A part of keys: what the speed of blocks depends on. `weights` names the weights and their quantization.

    It is called on the compute thread.
    """
    import torch

    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    threads = torch.get_num_threads()
    form = _form(weights, str(dtype))
    return f"{form}{_ON}{device.type} {machine} with {threads} threads, torch {torch.__version__}"


def known_profile(
    key: str, *, num_blocks: int | None = None, clock: Callable[[], float] = time.time
) -> SpeedProfile | None:
    """The profile on disk, unless it is older than `CACHED_SECONDS`, or of spans unlike one of `num_blocks` blocks."""
    try:
        entry = _STORED.validate_python(disk_cache.load(speed_key(key)))
    except ValidationError:  # nothing is stored, or the file is damaged
        return None
    is_recent = 0 <= clock() - entry.measured_at < CACHED_SECONDS
    return entry.profile if is_recent and (num_blocks is None or entry.profile.fits(num_blocks)) else None


def cached_profile(
    key: str, measure: Callable[[], Measurement], *, num_blocks: int, clock: Callable[[], float] = time.time
) -> SpeedProfile:
    """The profile on disk if it is of use (`known_profile`); else measured, and kept if the machine is quiet."""
    if (known := known_profile(key, num_blocks=num_blocks, clock=clock)) is not None:
        return known
    measurements: list[Measurement] = []
    while len(measurements) < MAX_ROUNDS and sum(each.seconds for each in measurements) < MAX_SECONDS:
        measurements.append(measure())
        if measurements[-1].is_quiet:
            profile = measurements[-1].profile
            disk_cache.store(speed_key(key), _STORED.dump_python(_Entry(profile, clock()), mode="json"))
            disk_cache.store(_last_key(key.partition(_ON)[0]), key)
            return profile
    log.info("the machine is busy: the server will measure its speed again at its next start")
    return best_of(measurements)


def last_profile(*, weights: str, dtype: str, clock: Callable[[], float] = time.time) -> SpeedProfile | None:
    """The profile on disk that this machine measured last with these weights, on whichever device.

    `weights` is as for `machine_key`, `dtype` a name such as "bfloat16".
    """
    key = disk_cache.load(_last_key(_form(weights, f"torch.{dtype}")))
    return known_profile(key, clock=clock) if isinstance(key, str) else None


def weights_key(fingerprint: str, quantization: str) -> str:
    """The name of weights and their quantization, as keys have it."""
    return f"{fingerprint}, quantization {quantization},"


def _form(weights: str, dtype: str) -> str:
    return f"{weights} in {dtype}"


def _last_key(form: str) -> str:
    return f"where the last times of passes through blocks of {form} are"


def speed_key(key: str) -> str:
    """The key of the disk cache's entry with a profile."""
    return f"times of passes through blocks of {key}"


@dataclass(frozen=True)
class _Entry:
    profile: SpeedProfile
    measured_at: float


_STORED = TypeAdapter(_Entry)
