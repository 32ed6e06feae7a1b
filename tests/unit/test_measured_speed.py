"""Which measured speeds a server keeps, and when its passes correct them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.host.computer import processor_name
from shoal.model.weights import disk_cache
from shoal.policy.machines.speed_profile import BlockTime, SpeedProfile
from shoal.server.kv.batch import Chunk
from shoal.server.kv.session_cache import Growth
from shoal.server.measured_speed import (
    CACHED_SECONDS,
    MAX_ROUNDS,
    Measurement,
    PassRuns,
    Runs,
    cached_profile,
    known_profile,
    speed_key,
    speeds_in,
)
from shoal.server.speed_watch import MAX_PASSES, MIN_SECONDS, RecentPasses, Speeds, Watch
from shoal.spans import Span

SPAN = Span(0, 8)


def runs(*seconds: float, cpu_fraction: float = 1.0) -> PassRuns:
    return PassRuns(8, Runs(seconds, cpu_fraction), Runs((seconds[0] / 8,), cpu_fraction))


QUIET = Measurement(runs(*(0.01,) * 5), runs(*(0.1,) * 5), num_tokens=128, batches=((1, runs(0.01)), (8, runs(0.02))))
QUIET_SPEEDS = Speeds(pytest.approx(100.0), pytest.approx(1280.0))
BUSY = Measurement(
    runs(3.0, 0.02, 2.5, 3.1, 2.9, cpu_fraction=0.9), runs(*(0.4,) * 5), num_tokens=128, batches=((1, runs(0.01)),)
)


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


def speeds(machine: Machine, *, num_blocks: int = 8, now: float = 1e9) -> Speeds:
    """How fast a server is that holds `num_blocks` blocks, as far as the machine has to be measured for it."""
    profile = cached_profile("here", machine, num_blocks=num_blocks, clock=lambda: now)
    return speeds_in(profile, Span(0, num_blocks))


def test_a_machine_is_busy_if_many_runs_are_slow_and_not_if_one_is() -> None:
    assert Runs((0.01, 0.011, 0.5, 0.01, 0.012)).is_quiet
    assert not Runs((0.01, 0.5, 0.5, 0.4, 0.012)).is_quiet


def test_a_machine_whose_runs_are_equally_slow_is_busy_if_other_programs_had_the_processor() -> None:
    assert Runs((3.0,) * 5, cpu_fraction=0.95).is_quiet
    assert not Runs((3.0,) * 5, cpu_fraction=0.1).is_quiet


def test_a_machine_is_quiet_if_it_was_in_all_runs() -> None:
    assert QUIET.is_quiet
    assert not BUSY.is_quiet
    disturbed = PassRuns(8, Runs((0.01,) * 3), Runs((0.001, 0.9, 0.9)))
    assert not Measurement(QUIET.decode, QUIET.prefill, 128, ((1, disturbed),)).is_quiet


def test_the_measurement_of_a_quiet_machine_is_kept_until_it_is_too_old() -> None:
    machine, now = Machine(QUIET, QUIET), 1e9
    found = [speeds(machine, now=now + after) for after in (0, 60, CACHED_SECONDS)]
    assert found == [QUIET_SPEEDS] * 3
    assert machine.num_measured == 2


def test_another_span_of_the_same_weights_needs_no_measurement_if_it_is_about_as_long() -> None:
    machine = Machine(QUIET, QUIET)
    assert speeds(machine).decode == pytest.approx(100.0)
    assert speeds(machine, num_blocks=4).decode == pytest.approx(200.0)
    assert speeds(machine, num_blocks=16).decode == pytest.approx(50.0)
    assert machine.num_measured == 1
    speeds(machine, num_blocks=3)
    assert machine.num_measured == 2


def test_what_a_pass_costs_beside_the_blocks_is_kept_apart() -> None:
    slow_to_begin = PassRuns(9, Runs((0.05,)), Runs((0.01,)))
    assert slow_to_begin.time == BlockTime(pytest.approx(0.005), pytest.approx(0.005))
    assert PassRuns(1, Runs((0.05,))).time == BlockTime(0.0, 0.05)


def test_a_busy_machine_is_measured_again_and_its_measurements_are_not_kept() -> None:
    calm_enough = Measurement(runs(0.02, 0.1, 0.1, 0.1, 0.1), BUSY.prefill, 128, ((1, runs(0.01)),))
    machine = Machine(*[calm_enough] * MAX_ROUNDS, QUIET)
    found = speeds(machine)
    assert (found.decode, machine.num_measured) == (pytest.approx(10.0), MAX_ROUNDS)
    assert known_profile("here") is None
    assert speeds(machine).decode == pytest.approx(100.0)


def test_the_best_of_what_a_busy_machine_has_shown_counts_batch_by_batch() -> None:
    def shown(decode: float, *batches: tuple[int, float]) -> Measurement:
        steady = tuple((size, runs(each, each * 9, each * 9)) for size, each in batches)
        return Measurement(runs(decode, decode * 9, decode * 9), QUIET.prefill, 128, steady)

    machine = Machine(shown(0.1, (1, 0.1), (8, 0.2)), shown(0.2, (1, 0.05), (8, 0.3), (32, 0.4)), shown(0.3, (1, 0.3)))
    profile = cached_profile("here", machine, num_blocks=8)
    assert profile.decode.seconds(8) == pytest.approx(0.9)
    assert [(size, time.seconds(8)) for size, time in profile.batches] == [
        (1, pytest.approx(0.45)),
        (8, pytest.approx(1.8)),
        (32, pytest.approx(3.6)),
    ]


def test_a_machine_that_takes_long_to_measure_is_measured_once() -> None:
    machine = Machine(BUSY, QUIET)
    assert cached_profile("here", machine, num_blocks=8) == BUSY.profile
    assert machine.num_measured == 1


@pytest.mark.parametrize(
    "change",
    [
        {"profile": 7},
        {"measured_at": None},
        {"profile": {"num_blocks": 0}},
        {"profile": {"decode": {"fixed": 0.0, "per_block": 0.0}}},
        {"profile": {"decode": {"fixed": -1.0, "per_block": 1.0}}},
        {"profile": {"batches": []}},
        {"profile": {"batches": [[8, {"fixed": 0.0, "per_block": 1.0}]]}},
        {"profile": {"prefill_tokens": 0}},
    ],
)
def test_a_damaged_entry_on_disk_is_measured_again(change: dict[str, object]) -> None:
    speeds(Machine(QUIET))
    entry = disk_cache.load(speed_key("here"))
    assert speeds(Machine()) == QUIET_SPEEDS, "nothing is measured"
    profile = change.get("profile")
    damaged = entry | (change if not isinstance(profile, dict) else {"profile": entry["profile"] | profile})
    disk_cache.store(speed_key("here"), damaged)
    assert known_profile("here", clock=lambda: 1e9) is None
    assert speeds(Machine(QUIET)) == QUIET_SPEEDS


@pytest.mark.parametrize("damaged", [[0.33, 1.0], "fast", {}, None, 7])
def test_an_entry_that_is_something_else_counts_for_nothing(damaged: object) -> None:
    disk_cache.store(speed_key("here"), damaged)
    assert known_profile("here") is None


def test_a_profile_is_read_as_it_was_measured() -> None:
    speeds(Machine(QUIET))
    profile = known_profile("here", clock=lambda: 1e9)
    assert profile == QUIET.profile
    assert isinstance(profile, SpeedProfile)


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
