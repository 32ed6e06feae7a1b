"""What a command says of what it waits for, where nobody looks at a terminal."""

from __future__ import annotations

import logging

import pytest

from shoal.cli import console
from shoal.cli.console import LEAST_SECONDS, REMIND_SECONDS, Lines, Wait, start_logging


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def logger(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SHOAL_LOG", raising=False)
    logger = logging.getLogger("shoal")
    before = logger.handlers, logger.level, logger.propagate
    yield logger
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    console.PROGRESS.setLevel(logging.NOTSET)


def test_each_thing_that_is_awaited_is_named_once(clock):
    lines = Lines(clock)
    assert [lines.next(what) for what in ("Joining", "Loading", "Loading", "Measuring")] == [
        "Joining",
        "Loading",
        None,
        "Measuring",
    ]


def test_steps_are_told_now_and_then(clock):
    lines, told = Lines(clock), []
    for step in range(1, 81):
        told.append(lines.next("Loading the blocks", f"{step} of 80"))
        clock.now += LEAST_SECONDS / 20
    assert [line for line in told if line] == [f"Loading the blocks: {step} of 80" for step in (1, 21, 41, 61)]


def test_what_takes_long_is_named_again_with_the_time_it_has_taken(clock):
    lines = Lines(clock)
    lines.next("Fingerprinting the weights")
    told = []
    for _ in range(int(2.5 * REMIND_SECONDS)):
        clock.now += 1
        told.append(lines.reminder())
    assert [line for line in told if line] == [
        f"Fingerprinting the weights (for {REMIND_SECONDS:.0f} s)",
        f"Fingerprinting the weights (for {2 * REMIND_SECONDS:.0f} s)",
    ]
    lines.end()
    clock.now += 10 * REMIND_SECONDS
    assert lines.reminder() is None


def test_a_server_without_a_terminal_logs_what_it_waits_for(capsys, clock):
    start_logging(verbose=False, default="warning", progress=True)
    wait = Wait(clock)
    wait.for_("Joining the swarm")
    wait.for_("Loading the blocks", step="1 of 4")
    clock.now += REMIND_SECONDS
    wait.remind()
    lines = [line.partition(" INFO shoal.progress: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["Joining the swarm", "Loading the blocks: 1 of 4", "Loading the blocks: 1 of 4 (for 30 s)"]


@pytest.mark.parametrize("level", ["warning", None])
def test_other_commands_and_other_levels_stay_silent(capsys, monkeypatch, level):
    if level:
        monkeypatch.setenv("SHOAL_LOG", level)
    start_logging(verbose=False, default="warning", progress=level is not None)
    Wait().for_("Joining the swarm")
    assert capsys.readouterr().err == ""
