"""Machines and their stays: drawn with a seed, read from files, fitted to traces."""

from __future__ import annotations

import json
import random
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.peers import MAX_SPEED_POINTS
from shoal.simulator.timeline import Timeline
from shoal.simulator.world.clusters import Cluster, read_clusters
from shoal.simulator.world.fitting import Durations, fit_habits, fit_hardware, fit_weibull, lives
from shoal.simulator.world.hardware import (
    SLOW_WHEN_FULL,
    SPEED_BY_SIZE,
    SPREAD_OF_SIZES,
    SPREAD_OF_SPEED,
    draw_hardware,
    draw_swarm,
    profiled,
    typical_hardware,
)
from shoal.simulator.world.stays import (
    SPOT_16,
    mean_present,
    present,
    stays_of_counts,
    volunteers,
    weibull,
    zones_that_vanish,
)
from shoal.simulator.world.traces import Window, busiest_windows, read_trace, stays_of_trace
from shoal.spans import Span

HOUR = 3600.0


def test_acts_happen_in_the_order_of_their_times_and_then_of_their_planning():
    timeline, done = Timeline(), list[str]()
    timeline.at(2.0, lambda: done.append("late"))
    timeline.at(1.0, lambda: done.append("first"))
    timeline.at(1.0, lambda: timeline.after(0.5, lambda: done.append("planned meanwhile")))
    timeline.at(3.0, lambda: done.append("after the end"))
    timeline.run_until(3.0)
    assert done == ["first", "planned meanwhile", "late"]
    assert timeline.now == 3.0


COUNTS = st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 6)), min_size=1, max_size=20)


@given(COUNTS, st.integers(0, 100))
def test_stays_have_the_counts_that_they_were_made_of(steps, seed):
    counts, at = [], 0.0
    for gap, count in steps:
        counts.append((at, count))
        at += gap
    stays = stays_of_counts(random.Random(seed), counts, zone="z", seconds=at, first_slot=10)
    for begins, count in counts:
        assert present(stays, begins) == count
    for _, of_slot in groupby(sorted(stays, key=lambda stay: (stay.slot, stay.begins)), key=lambda stay: stay.slot):
        assert all(one.ends <= other.begins for one, other in pairwise(of_slot))


def test_as_many_volunteers_are_there_as_asked_from_the_beginning_on():
    runs = [volunteers(random.Random(seed), num_machines=50, mean_life=HOUR, seconds=8 * HOUR) for seed in range(20)]
    assert sum(present(stays, 0.0) for stays in runs) / 20 == pytest.approx(50, rel=0.1)
    assert sum(mean_present(stays, 8 * HOUR) for stays in runs) / 20 == pytest.approx(50, rel=0.1)


def test_half_of_the_volunteers_leave_within_minutes():
    rng = random.Random(0)
    drawn = sorted(weibull(rng, HOUR, 0.393) for _ in range(10_000))
    assert 6 * 60 < drawn[5000] < 8 * 60


def test_zones_vanish_with_all_of_their_machines():
    stays = zones_that_vanish(random.Random(1), zones=["a", "b"], seconds=48 * HOUR)
    assert stays == zones_that_vanish(random.Random(1), zones=["a", "b"], seconds=48 * HOUR)
    counts = {
        zone: [present([s for s in stays if s.zone == zone], at) for at in range(0, 172_800, 600)] for zone in "ab"
    }
    for each in counts.values():
        assert 0 in each
        assert max(each) > 1
        assert max(each) <= SPOT_16.most


def test_a_fit_finds_the_parameters_that_durations_were_drawn_with():
    rng = random.Random(3)
    drawn = [weibull(rng, 1000.0, 0.6) for _ in range(4000)]
    fit = fit_weibull(Durations(tuple(drawn)))
    assert fit.shape == pytest.approx(0.6, rel=0.05)
    assert fit.mean == pytest.approx(1000.0, rel=0.1)
    assert fit.distance < 0.03
    # Durations that were cut off are not mistaken for short ones.
    cut = fit_weibull(Durations(tuple(d for d in drawn if d < 1500), tuple(1500.0 for d in drawn if d >= 1500)))
    assert cut.mean == pytest.approx(1000.0, rel=0.15)


def test_a_fit_takes_two_different_durations():
    with pytest.raises(ValueError, match="two different durations"):
        fit_weibull(Durations((5.0, 5.0)))


TRACE = {
    "title": "a test",
    "most_per_zone": 4,
    "zones": {
        "a": {"machine": "v100", "gap_seconds": 60, "seconds": 7200, "changes": [0, 0, 600, 4, 1800, 2, 3600, 0]},
        "b": {"seconds": 7200, "changes": [0, 1, 5000, 3]},
    },
}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_window_of_a_trace_has_its_machines(tmp_path):
    trace = read_trace(write(tmp_path / "trace.json", TRACE))
    stays = stays_of_trace(random.Random(0), trace, Window(1000.0, 3000.0))
    assert present(stays, 0.0) == 5
    assert present(stays, 900.0) == 3
    assert present(stays, 2700.0) == 1
    assert {stay.zone for stay in stays} == {"a", "b"}
    assert [window.begins for window in busiest_windows(trace, seconds=1800, least_machines=3, most=9)] == [
        0.0,
        1800.0,
        5400.0,
    ]
    with pytest.raises(UserError, match="no window"):
        busiest_windows(trace, seconds=1800, least_machines=9, most=9)


def test_zones_of_a_trace_have_habits(tmp_path):
    changes = [0, 0]
    for turn in range(20):
        changes += [1000 * turn + 100 + turn, 3, 1000 * turn + 500, 0]
    trace = read_trace(
        write(tmp_path / "trace.json", {"most_per_zone": 4, "zones": {"a": {"seconds": 20_000, "changes": changes}}})
    )
    habits, on, off = fit_habits(trace)
    assert habits.on_seconds == pytest.approx(390, rel=0.05)
    assert habits.off_seconds == pytest.approx(610, rel=0.05)
    assert habits.least_share == pytest.approx(0.5)
    assert min(on.shape, off.shape) > 5  # these durations hardly vary
    assert len(lives(trace).ended) == 60


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"zones": {}}, "zones"),
        ({"zones": {"a": {"seconds": 9, "changes": [0, 1, 5]}}}, "pairs of a second and a count"),
        ({"zones": {"a": {"seconds": 9, "changes": [5, 1, 5, 2]}}}, "grow"),
        ({"zones": {"a": {"seconds": 9, "changes": [0, 9]}}}, "most_per_zone"),
        ({"zones": {"a": {"seconds": 9, "changes": [0, 1.5]}}}, "whole numbers"),
        ({"zones": {"a": {"seconds": 9, "changes": [0, -1]}}}, "changes"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(tmp_path, damage, message):
    with pytest.raises(UserError, match=message) as refused:
        read_trace(write(tmp_path / "trace.json", TRACE | damage))
    assert "docs/scale.md" in (refused.value.hint or "")


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json"):
        read_trace(tmp_path / "nothing.json")


CLUSTERS = {
    "models": {"m": {"blocks": 6, "activation_bytes": 100}},
    "clusters": {
        "two": {
            "nodes": ["big", "small"],
            "client_links": [[1000, 0.01], [2000, 0.01]],
            "links": [[[5000, 0.001]]],
            "profiles": {
                "m": {
                    "big": {"max_blocks": 4, "tokens_per_s": [40, 18, 11, 7]},
                    "small": {"max_blocks": 2, "tokens_per_s": [9, 4]},
                }
            },
            "layouts": {"m": {"by hand": [[0, 4], [4, 6]]}},
        }
    },
}


def test_a_cluster_has_the_machines_and_layouts_of_its_file(tmp_path):
    (cluster,) = read_clusters(write(tmp_path / "clusters.json", CLUSTERS))
    assert cluster.name == "two/m"
    assert cluster.layouts == {"by hand": (Span(0, 4), Span(4, 6))}
    machines = [hardware.machine("x", None) for hardware in cluster.machines]
    assert [machine.max_blocks for machine in machines] == [4, 2]
    assert [machines[0].speed(length) for length in (1, 2, 3, 4)] == pytest.approx([40, 18, 11, 7])
    assert [machine.network_speed for machine in machines] == [50, 50]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("profiles", "m", "big", "max_blocks"), 3, "one speed for each length"),
        (("layouts", "m", "by hand"), [[0, 4]], "one span for each machine"),
        (("layouts", "m", "by hand"), [[0, 4], [4, 9]], "no span"),
        (("nodes",), ["big", "huge"], "no profile of huge"),
        (("client_links",), [], "uniform_link"),
    ],
)
def test_a_cluster_that_does_not_fit_together_is_refused(tmp_path, path, value, message):
    damaged = json.loads(json.dumps(CLUSTERS))
    *parents, last = path
    place = damaged["clusters"]["two"]
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(UserError, match=message):
        read_clusters(write(tmp_path / "clusters.json", damaged))


@pytest.mark.parametrize(("num_machines", "num_blocks", "copies"), [(14, 80, 1.5), (100, 80, 3.0), (100, 126, 6.0)])
def test_a_random_swarm_can_hold_as_many_copies_as_asked(num_machines, num_blocks, copies):
    machines = draw_swarm(random.Random(0), num_machines=num_machines, num_blocks=num_blocks, copies=copies)
    assert sum(machine.max_blocks for machine in machines) == pytest.approx(copies * num_blocks, rel=0.05)


def test_random_machines_differ_as_those_of_clusters_do():
    rng = random.Random(0)
    machines = [draw_hardware(rng, typical_blocks=100.0, most_blocks=10_000) for _ in range(2000)]
    fit = fit_hardware([Cluster("drawn", 80, tuple(machines), {})])
    assert fit.num_machines == 2000
    assert fit.spread_of_sizes == pytest.approx(SPREAD_OF_SIZES, rel=0.05)
    assert fit.speed_by_size == pytest.approx(SPEED_BY_SIZE, rel=0.05)
    assert fit.spread_of_speed == pytest.approx(SPREAD_OF_SPEED, rel=0.05)
    assert SLOW_WHEN_FULL[0] <= fit.cache_factors[0] < fit.cache_factors[1] <= SLOW_WHEN_FULL[1]


def test_a_fit_of_hardware_takes_two_sizes():
    with pytest.raises(ValueError, match="the same number of blocks"):
        fit_hardware([Cluster("equal", 80, (typical_hardware(4), typical_hardware(4)), {})])


def test_machines_of_different_models_are_not_compared():
    slow, fast = (profiled("x", [speed] * 2, network_speed=1e9, load_seconds=60) for speed in (1.0, 1000.0))
    small, large = (profiled("x", [speed] * 4, network_speed=1e9, load_seconds=60) for speed in (2.0, 2000.0))
    fit = fit_hardware([Cluster("a", 8, (slow, small), {}), Cluster("b", 9, (fast, large), {})])
    assert fit.speed_by_size == pytest.approx(1.0)
    assert fit.spread_of_speed == pytest.approx(0.0, abs=1e-6)


def test_a_profile_is_announced_with_few_points_that_are_nearly_right():
    speeds = [100 / length**1.2 for length in range(1, 31)]
    hardware = profiled("x", speeds, network_speed=1e9, load_seconds=60)
    assert hardware.capacity.block_speeds[0][0] == 1
    assert hardware.capacity.block_speeds[-1][0] == 30
    assert len(hardware.capacity.block_speeds) == MAX_SPEED_POINTS
    assert hardware.machine("x", None).speed(17) == pytest.approx(speeds[16])
