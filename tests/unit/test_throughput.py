"""Which measured speeds a server keeps, and when its passes correct them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.model.weights import disk_cache
from shoal.server.kv.batch import Chunk
from shoal.server.kv.session_cache import Growth
from shoal.server.speed_watch import MAX_PASSES, MIN_SECONDS, RecentPasses, Speeds, Watch
from shoal.server.throughput import CACHED_SECONDS, MAX_ROUNDS, Measurement, Runs, cached_speeds, processor_name
from shoal.spans import Span

SPAN = Span(0, 8)
QUIET = Measurement(Runs((0.01,) * 5, 1.0), Runs((0.1,) * 5, 1.0), num_tokens=128)
BUSY = Measurement(Runs((3.0, 0.02, 2.5, 3.1, 2.9), 0.9), Runs((0.4,) * 5, 1.0), num_tokens=128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))


class Machine:
    """Returns one measurement after another, and counts them."""

    def __init__(self, *measurements: Measurement) -> None:
        self._measurements = iter(measurements)
        self.num_measured = 0

    def __call__(self) -> Measurement:
        self.num_measured += 1
        return next(self._measurements)


def test_a_machine_is_busy_if_many_runs_are_slow_and_not_if_one_is() -> None:
    assert Runs((0.01, 0.011, 0.5, 0.01, 0.012)).is_quiet
    assert not Runs((0.01, 0.5, 0.5, 0.4, 0.012)).is_quiet


def test_a_machine_whose_runs_are_equally_slow_is_busy_if_other_programs_had_the_processor() -> None:
    assert Runs((3.0,) * 5, cpu_fraction=0.95).is_quiet
    assert not Runs((3.0,) * 5, cpu_fraction=0.1).is_quiet


def test_the_measurement_of_a_quiet_machine_is_kept_until_it_is_too_old() -> None:
    machine, now = Machine(QUIET, QUIET), 1e9
    speeds = [
        cached_speeds("here", machine, clock=lambda after=after: now + after) for after in (0, 60, CACHED_SECONDS)
    ]
    assert speeds == [Speeds(100.0, 1280.0)] * 3
    assert machine.num_measured == 2


def test_a_busy_machine_is_measured_again_and_its_measurements_are_not_kept() -> None:
    calm_enough = Measurement(Runs((0.02, 0.1, 0.1, 0.1, 0.1)), BUSY.prefill, num_tokens=128)
    machine = Machine(*[calm_enough] * MAX_ROUNDS, QUIET)
    speeds = cached_speeds("here", machine)
    assert (speeds.decode, machine.num_measured) == (pytest.approx(10.0), MAX_ROUNDS)
    assert cached_speeds("here", machine) == QUIET.speeds


def test_a_machine_that_takes_long_to_measure_is_measured_once() -> None:
    machine = Machine(BUSY, QUIET)
    assert cached_speeds("here", machine) == BUSY.speeds
    assert machine.num_measured == 1


@pytest.mark.parametrize("damaged", [[0.33, 1.0], {"decode": 0.0, "prefill": 1.0, "measured_at": 0.0}, "fast", {}])
def test_a_damaged_entry_on_disk_is_measured_again(damaged: object) -> None:
    disk_cache.store("here", damaged)
    assert cached_speeds("here", Machine(QUIET), clock=lambda: 1.0) == QUIET.speeds


def test_the_key_names_the_model_of_the_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) 8481C\n"
    )
    assert processor_name(cpuinfo) == "Intel(R) Xeon(R) 8481C"
    assert processor_name(tmp_path / "none")


# While it serves.


def chunk(num_tokens: int = 1, *, rows: int = 1, cached: int = 64, span: Span = SPAN) -> Chunk:
    return Chunk(
        span=span,
        hidden_BTD=torch.zeros(rows, num_tokens, 4),
        positions_BT=None,
        mask_BS=None,
        num_computed_tokens=cached,
        pages=((),) * rows,
        growth=Growth((), ()),
        cache=None,
    )


def watch_of(ratio: float, *, every: float = 1.0, passes: int = MAX_PASSES, chunks: tuple[Chunk, ...] = ()) -> Watch:
    """A server that announced 10 tokens/s, after passes that took `ratio` times as long as announced."""
    watch = Watch(Speeds(10.0, 1000.0), SPAN)
    for number in range(passes):
        watch.decoded(chunks or (chunk(),), 0.1 * ratio, now=number * every)
    return watch


@pytest.mark.parametrize("ratio", [0.01, 0.4, 2.5, 30.0])
def test_a_server_that_is_much_faster_or_slower_than_it_says_corrects_itself(ratio: float) -> None:
    assert watch_of(ratio).speeds == Speeds(pytest.approx(10.0 / ratio), 1000.0)


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.8])
def test_a_server_that_is_about_as_fast_as_it_says_changes_nothing(ratio: float) -> None:
    assert watch_of(ratio).speeds == Speeds(10.0, 1000.0)


def test_a_short_disturbance_corrects_nothing() -> None:
    assert watch_of(30.0, every=MIN_SECONDS / MAX_PASSES / 2).speeds.decode == 10.0
    recent = RecentPasses()
    for number in range(MAX_PASSES):
        recent = recent.with_pass(30.0 if number % 2 else 1.0, now=float(number))
    assert recent.correction is None


def test_a_correction_is_reported_once_and_then_stays() -> None:
    reported: list[Speeds] = []
    watch = Watch(Speeds(0.33, 1000.0), SPAN, on_correction=reported.append)
    for number in range(5 * MAX_PASSES):
        watch.decoded((chunk(),), 0.05, now=float(number))
    assert reported == [Speeds(pytest.approx(20.0), 1000.0)]


def test_a_pass_with_more_work_can_show_that_a_server_is_faster_but_not_that_it_is_slower() -> None:
    many = tuple(chunk() for _ in range(16))
    assert watch_of(0.2, chunks=many).speeds.decode == pytest.approx(50.0)
    for heavy in many, (chunk(cached=100_000),), (chunk(8),), (chunk(rows=4),):
        assert watch_of(5.0, chunks=heavy).speeds.decode == 10.0


def test_a_pass_through_some_of_the_blocks_is_not_compared() -> None:
    assert watch_of(0.1, chunks=(chunk(span=Span(0, 2)),)).speeds.decode == 10.0


@pytest.mark.parametrize(
    ("num_tokens", "seconds", "speed"), [(128, 1.28, 100.0), (512, 0.01, 12800.0), (512, 0.3, 1000.0)]
)
def test_prompts_are_compared_with_the_measured_prompt(num_tokens: int, seconds: float, speed: float) -> None:
    watch = Watch(Speeds(10.0, 1000.0), SPAN)
    for number in range(MAX_PASSES):
        watch.prefilled((chunk(num_tokens, cached=0),), seconds, now=float(number))
    assert watch.speeds == Speeds(10.0, pytest.approx(speed))
