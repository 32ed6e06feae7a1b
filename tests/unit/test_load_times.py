"""How long a machine takes to load a block, as its loads show, and which blocks it loads quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.bundled import STORIES
from shoal.model.linear.quantization import Quantization
from shoal.model.loading import Progress, load_body
from shoal.model.weights import disk_cache
from shoal.model.weights.checkpoint import Checkpoint
from shoal.peers import MAX_SPANS_ON_DISK
from shoal.policy.machines.machine import Machine
from shoal.server.measuring.load_times import ASSUMED_DOWNLOAD_BYTES, Load, LoadTimes, known_times, timed
from shoal.server.measuring.on_disk import missing_blocks, quick_blocks, spans_of
from shoal.spans import Span

HERE = Load(num_blocks=4, num_missing=0, seconds_before=1.0, seconds=8.0, quantized=False)
FROM_HUB = Load(num_blocks=4, num_missing=2, seconds_before=20.0, seconds=28.0, quantized=False)
QUANTIZING = Load(num_blocks=4, num_missing=0, seconds_before=1.0, seconds=26.0, quantized=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))


@dataclass
class Server:
    """What a server computes with."""

    quantization: Quantization = Quantization.NONE
    key: str = "some weights"
    free_bytes: int = 0

    def __post_init__(self) -> None:
        self.checkpoint = Checkpoint.open(STORIES)
        self.dtype = torch.float32
        self.device = torch.device("cpu")


def test_a_load_from_the_disk_tells_what_a_block_on_disk_takes() -> None:
    times = LoadTimes().after(HERE)
    assert times == LoadTimes(read=2.0)
    assert times.quick() == times.slow(quantizes=False, download_bytes=None) == 2.0


def test_a_download_is_counted_apart_and_only_for_the_blocks_that_were_missing() -> None:
    times = LoadTimes().after(FROM_HUB)
    assert times == LoadTimes(read=2.0, download=10.0)
    assert (times.quick(), times.slow(quantizes=False, download_bytes=1e9)) == (2.0, 12.0)


def test_until_a_download_was_seen_one_is_assumed() -> None:
    times = LoadTimes().after(HERE)
    assert times.slow(quantizes=False, download_bytes=3 * ASSUMED_DOWNLOAD_BYTES) == pytest.approx(5.0)


def test_quantizing_makes_the_first_load_slow_and_not_the_next() -> None:
    times = LoadTimes().after(QUANTIZING)
    assert times.quick() == times.slow(quantizes=True, download_bytes=None) == 6.5
    times = times.after(HERE)
    assert (times.quick(), times.slow(quantizes=True, download_bytes=None)) == (2.0, 6.5)


def test_loads_are_averaged_and_the_last_counts_most() -> None:
    times = LoadTimes(read=4.0).after(HERE)
    assert times.read == 3.0


def test_nothing_is_known_before_the_first_load() -> None:
    assert known_times("some weights") == LoadTimes()
    assert LoadTimes().quick() is None
    assert LoadTimes().slow(quantizes=True, download_bytes=1.0) is None


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_a_load_took_is_remembered_for_these_weights_on_this_machine() -> None:
    clock, told = Clock(), list[tuple[int, bool]]()

    def load(progress: Progress) -> str:
        clock.now += 3.0
        for block in range(4, 8):
            progress(block, False)
            clock.now += 1.0
        return "the blocks"

    assert timed(load, Server(), Span(4, 8), lambda *each: told.append(each), clock=clock) == "the blocks"
    assert told == [(block, False) for block in range(4, 8)]
    assert known_times("some weights") == LoadTimes(read=7.0 / 4)
    assert known_times("other weights") == LoadTimes()


def test_a_load_that_fails_tells_nothing() -> None:
    def load(progress: Progress) -> None:
        progress(0, False)
        raise KeyError

    with pytest.raises(KeyError):
        timed(load, Server(), Span(0, 1), lambda *_: None)
    assert known_times("some weights") == LoadTimes()


def test_a_clock_that_jumped_tells_nothing() -> None:
    clock = Clock()

    def load(progress: Progress) -> None:
        progress(0, False)
        clock.now -= 1000.0

    timed(load, Server(), Span(0, 1), lambda *_: None, clock=clock)
    assert known_times("some weights") == LoadTimes()


@pytest.mark.parametrize(
    "damaged", [[], 7, {"read": "soon"}, {"read": -1.0}, {"read": 1e12}, {"quantize": float("nan")}]
)
def test_a_damaged_entry_on_disk_counts_for_nothing(damaged: object) -> None:
    disk_cache.store("seconds to load a block of some weights", damaged)
    assert known_times("some weights") == LoadTimes()


# On disk.


def test_all_blocks_of_a_folder_are_on_disk() -> None:
    assert quick_blocks(Server()) == list(range(12))
    assert missing_blocks(Server(), Span(0, 12)) == []


def test_a_server_that_quantizes_is_quick_with_what_it_has_quantized_before() -> None:
    server = Server(Quantization.NF4)
    assert quick_blocks(server) == []
    load_body(server.checkpoint, Span(3, 5), dtype=server.dtype, quantization=server.quantization)
    assert quick_blocks(server) == [3, 4]
    assert missing_blocks(server, Span(0, 12)) == [], "nothing has to be downloaded"


def test_blocks_on_disk_are_told_as_spans() -> None:
    assert spans_of([5, 0, 1, 2, 7, 8]) == (Span(0, 3), Span(5, 6), Span(7, 9))
    assert spans_of([]) == ()


@given(st.sets(st.integers(0, 200)))
def test_of_many_spans_the_longest_are_told(blocks: set[int]) -> None:
    spans = spans_of(blocks)
    told = {block for span in spans for block in span}
    assert len(spans) <= MAX_SPANS_ON_DISK
    assert list(spans) == sorted(spans)
    assert told <= blocks
    assert told == blocks or len(spans) == MAX_SPANS_ON_DISK
    assert all(span.end not in blocks and span.start - 1 not in blocks for span in spans)


def test_the_time_for_a_span_counts_its_blocks_on_disk() -> None:
    on_disk = (Span(0, 2), Span(5, 6))
    joins = Machine("a", None, 8, ((1, 1.0),), load_seconds=10.0, disk_seconds=1.0, on_disk=on_disk)
    assert joins.seconds_to_load(Span(1, 6)) == 2 * 1.0 + 3 * 10.0
