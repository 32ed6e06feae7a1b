"""When a machine counts as idle, by the processor time that other programs use."""

from __future__ import annotations

from itertools import accumulate, pairwise

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bundled import STORIES
from shoal.cli import run
from shoal.cli.service.others_use import OthersUse
from shoal.policy.idleness import BUSY_SECONDS, IDLE_SECONDS, Idleness


def played(cores: int, use: list[float], idleness: Idleness | None = None, start: int = 0) -> list[Idleness]:
    """What is known after each second in which others used so many cores."""
    idleness = idleness or Idleness(cores)
    used = idleness.looks[-1][1] if idleness.looks else 0.0
    states = []
    for second, total in enumerate(accumulate(use, initial=used), start):
        idleness = idleness.looked(float(second), total)
        states.append(idleness)
    return states


def test_a_machine_is_idle_once_others_have_hardly_used_it_for_a_while() -> None:
    states = played(4, [0.1] * 70)
    assert [each.is_idle for each in states].index(True) == IDLE_SECONDS


def test_it_is_not_idle_while_a_program_computes() -> None:
    assert not any(each.is_idle for each in played(4, [1.0] * 300))


def test_a_program_that_computes_gets_the_machine_within_seconds() -> None:
    idle = played(4, [0.0] * 61)[-1]
    assert idle.is_idle
    states = played(4, [1.0] * 20, idle, start=61)
    seconds = [each.is_idle for each in states].index(False)
    assert 0 < seconds <= BUSY_SECONDS


def test_a_short_burst_disturbs_nothing() -> None:
    idle = played(4, [0.0] * 61)[-1]
    assert all(each.is_idle for each in played(4, [2.0, 2.0] + [0.0] * 60, idle, start=61))


def test_after_a_program_has_ended_the_whole_while_has_to_pass_again() -> None:
    idle = played(4, [0.0] * 61)[-1]
    busy = played(4, [3.0] * 30, idle, start=61)[-1]
    assert not busy.is_idle
    states = played(4, [0.0] * 70, busy, start=91)
    assert IDLE_SECONDS - 5 <= [each.is_idle for each in states].index(True) <= IDLE_SECONDS + 1


@pytest.mark.parametrize(("cores", "limit"), [(1, 0.5), (4, 0.5), (64, 6.4)])
def test_many_cores_have_room_for_what_others_do(cores: int, limit: float) -> None:
    assert Idleness(cores).limit == pytest.approx(limit)


@given(st.lists(st.floats(0, 8), max_size=300))
def test_it_remembers_no_more_looks_than_its_rule_needs(use: list[float]) -> None:
    assert all(len(each.looks) <= IDLE_SECONDS + 2 for each in played(8, use))


@given(st.lists(st.floats(0, 8), min_size=1, max_size=200))
def test_it_begins_only_after_a_while_of_little_use_and_ends_only_by_much(use: list[float]) -> None:
    states = [Idleness(8), *played(8, use)]
    for before, after in pairwise(states):
        if after.is_idle and not before.is_idle:
            past = after.used_over(IDLE_SECONDS)
            assert past is not None
            assert past <= after.limit / 2
        if before.is_idle and not after.is_idle:
            last = before.looked(*after.looks[-1]).looks[-1]
            recent = [used for at, used in before.looks if last[0] - at >= BUSY_SECONDS]
            assert recent
            assert last[1] - recent[-1] > after.limit * BUSY_SECONDS * 0.99


def test_what_others_use_is_counted_without_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"total": 100.0, "own": 10.0}
    kinds = psutil.cpu_times()._fields
    monkeypatch.setattr(
        psutil, "cpu_times", lambda: type("Times", (), {**dict.fromkeys(kinds, 0.0), "user": clock["total"]})
    )
    monkeypatch.setattr(
        psutil.Process, "cpu_times", lambda self: type("Times", (), {"user": clock["own"], "system": 0.0})
    )
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [])
    use = OthersUse()
    clock.update(total=108.0, own=15.0)
    assert use.look() == pytest.approx(3.0)
    clock.update(total=110.0, own=19.0)  # the two are not read at the same moment
    assert use.look() == pytest.approx(3.0)


def test_a_swarm_is_not_started_on_a_machine_that_comes_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(STORIES), "--new-swarm", "--when", "idle"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "--new-swarm and --when idle exclude each other" in error
    assert hint.startswith("hint: start it on a machine that stays")
