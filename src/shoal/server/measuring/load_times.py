"""How long this machine takes to load a block, as its own loads have shown. It is remembered on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from shoal.model.loading import Progress
from shoal.model.weights import disk_cache
from shoal.server.measuring.means import Means
from shoal.server.measuring.on_disk import missing_blocks
from shoal.spans import Span

T = TypeVar("T")

ASSUMED_DOWNLOAD_BYTES = 12.5e6
"""Bytes per second (100 Mbit/s) that downloads are assumed to have until the first was seen."""
LONGEST_SECONDS = 1e5
"""A block that takes longer was not loaded, but forgotten: the machine slept, or its clock is wrong."""
NEWEST_WEIGHT = 0.5
"""The weight of a new load in the average: the disk is sometimes warm, and the hub sometimes slow."""


@dataclass(frozen=True)
class Load:
    """One load of `num_blocks` blocks, of which `num_missing` had to be downloaded first.

    `seconds_before` passed until the first weight was read, `seconds` in all. `quantized` is whether blocks were
    quantized in it.
    """

    num_blocks: int
    num_missing: int
    seconds_before: float
    seconds: float
    quantized: bool


@dataclass(frozen=True)
class LoadTimes:
    """Seconds that a block takes, `None` if no load has shown it.

    `read`: to be read in the form in which the server holds it. `quantize`: to be read and quantized. `download`: for
    its files to come, beside that.
    """

    read: float | None = None
    quantize: float | None = None
    download: float | None = None

    def __post_init__(self) -> None:
        if any(
            each is not None and not 0 <= each <= LONGEST_SECONDS for each in (self.read, self.quantize, self.download)
        ):
            raise ValueError("no time that a load can take")

    def after(self, load: Load) -> LoadTimes:
        """With what one more load has shown."""
        times, here = self, load.seconds
        if load.num_missing:
            times = replace(times, download=_average(self.download, load.seconds_before / load.num_missing))
            here -= load.seconds_before
        if load.quantized:
            return replace(times, quantize=_average(self.quantize, here / load.num_blocks))
        return replace(times, read=_average(self.read, here / load.num_blocks))

    def quick(self) -> float | None:
        """The seconds for a block on disk; one that was never read quantized takes no longer than quantizing it."""
        return self.quantize if self.read is None else self.read

    def slow(self, *, quantizes: bool, download_bytes: float | None) -> float | None:
        """The seconds for a block that is not quickly loadable.

        `quantizes`: it has to be quantized. `download_bytes`: the bytes that have to be downloaded, `None` if none.
        """
        here = self.quantize if quantizes and self.quantize is not None else self.quick()
        if here is None or download_bytes is None:
            return here
        return here + (download_bytes / ASSUMED_DOWNLOAD_BYTES if self.download is None else self.download)


def _average(before: float | None, now: float) -> float:
    return now if before is None else (1 - NEWEST_WEIGHT) * before + NEWEST_WEIGHT * now


_STORED = TypeAdapter(LoadTimes)


def known_times(key: str) -> LoadTimes:
    """What earlier loads have shown; `key` names the weights, their form and the machine."""
    try:
        return _STORED.validate_python(disk_cache.load(_key(key)))
    except ValidationError:  # nothing is stored, or the file is damaged
        return LoadTimes()


def timed(
    load: Callable[[Progress], T],
    means: Means,
    span: Span,
    progress: Progress,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> T:
    """What `load` returns, which loads `span` and calls its argument for each weight; `progress` is called too.

    What that shows is remembered for `means.key`.
    """
    watch = _Watch(progress, clock)
    num_missing = len(missing_blocks(means, span))
    began = clock()
    loaded = load(watch.on_weight)
    if watch.first_at is not None:
        shown = Load(len(span), num_missing, watch.first_at - began, clock() - began, watch.quantized)
        _remember(means.key, shown)
    return loaded


def _remember(key: str, load: Load) -> None:
    with contextlib.suppress(ValueError):
        disk_cache.store(_key(key), _STORED.dump_python(known_times(key).after(load), mode="json"))


@dataclass
class _Watch:
    """Notes when the first weight is read, and whether weights are quantized."""

    progress: Progress
    clock: Callable[[], float]
    first_at: float | None = field(default=None, init=False)
    quantized: bool = field(default=False, init=False)

    def on_weight(self, block: int, quantizes: bool) -> None:
        if self.first_at is None:
            self.first_at = self.clock()
        self.quantized |= quantizes
        self.progress(block, quantizes)


def _key(key: str) -> str:
    return f"seconds to load a block of {key}"
