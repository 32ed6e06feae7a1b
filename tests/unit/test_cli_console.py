"""What commands print to the terminal: progress without a terminal, and speeds."""

from __future__ import annotations

import logging

import pytest

from shoal.cli.terminal import console
from shoal.cli.terminal.console import ProgressReporter, figure, start_logging, tokens_per_second
from shoal.progress_log import MIN_LINE_SECONDS, REMINDER_SECONDS, ProgressLog


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


def test_each_task_is_logged_once(clock):
    log = ProgressLog(clock)
    assert [log.line_for(task) for task in ("Joining", "Loading", "Loading", "Measuring")] == [
        "Joining",
        "Loading",
        None,
        "Measuring",
    ]


def test_steps_are_logged_at_intervals(clock):
    log, logged = ProgressLog(clock), []
    for step in range(1, 81):
        logged.append(log.line_for("Loading the blocks", f"{step} of 80"))
        clock.now += MIN_LINE_SECONDS / 20
    assert [line for line in logged if line] == [f"Loading the blocks: {step} of 80" for step in (1, 21, 41, 61)]


def test_a_long_task_is_logged_again_with_its_duration(clock):
    log = ProgressLog(clock)
    log.line_for("Fingerprinting the weights")
    logged = []
    for _ in range(int(2.5 * REMINDER_SECONDS)):
        clock.now += 1
        logged.append(log.reminder())
    assert [line for line in logged if line] == [
        f"Fingerprinting the weights (for {REMINDER_SECONDS:.0f} s)",
        f"Fingerprinting the weights (for {2 * REMINDER_SECONDS:.0f} s)",
    ]
    log.clear()
    clock.now += 10 * REMINDER_SECONDS
    assert log.reminder() is None


def test_a_server_without_a_terminal_logs_its_progress(capsys, clock):
    start_logging(verbose=False, default="warning", progress=True)
    reporter = ProgressReporter(clock)
    reporter.show("Joining the swarm")
    reporter.show("Loading the blocks", step="1 of 4")
    clock.now += REMINDER_SECONDS
    reporter.remind()
    lines = [line.partition(" INFO shoal.progress: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "Joining the swarm",
        "Loading the blocks: 1 of 4",
        f"Loading the blocks: 1 of 4 (for {REMINDER_SECONDS:.0f} s)",
    ]


@pytest.mark.parametrize("level", ["warning", None])
def test_other_commands_and_other_levels_log_no_progress(capsys, monkeypatch, level):
    if level:
        monkeypatch.setenv("SHOAL_LOG", level)
    start_logging(verbose=False, default="warning", progress=level is not None)
    ProgressReporter().show("Joining the swarm")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (98765.4, "98,765 tokens/s"),
        (770.2, "770 tokens/s"),
        (99.96, "100 tokens/s"),
        (14.14, "14.1 tokens/s"),
        (2.0, "2 tokens/s"),
        (0.333, "0.333 tokens/s"),
        (0.0123, "0.0123 tokens/s"),
    ],
)
def test_a_rate_has_three_significant_digits(rate, text):
    assert tokens_per_second(rate) == text


def test_a_rate_that_was_not_measured_is_not_a_number():
    assert figure(None) == "…"
    assert figure(0.0) == "…"
    assert tokens_per_second(None) == "not measured"
