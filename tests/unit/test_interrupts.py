"""What a command makes of Ctrl-C, SIGTERM and a closed terminal."""

from __future__ import annotations

import ast
import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.host.processes import Children, interruptible

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@contextlib.contextmanager
def failing_when_closed() -> Iterator[None]:
    try:
        yield
    finally:
        raise OSError("closed in the middle")


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_that_a_library_swallows_is_raised_again(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(), contextlib.suppress(BaseException):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_fails_after_an_interrupt_is_the_interrupt(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(), failing_when_closed():
        signal.raise_signal(number)


def test_a_command_that_waits_for_a_process_notices_an_interrupt_that_a_library_swallowed() -> None:
    def silent(*_: object) -> subprocess.Popen[str]:
        return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def command() -> None:
        with interruptible() as check, Children() as children:
            child = children.start("silent", launch=silent)
            for number, _ in enumerate(children.wait_for([child], seconds=1e6)):
                if number == 0:
                    with contextlib.suppress(KeyboardInterrupt):
                        signal.raise_signal(signal.SIGTERM)
                else:
                    check()

    with pytest.raises(KeyboardInterrupt):
        command()


def test_an_error_without_an_interrupt_is_that_error() -> None:
    with pytest.raises(OSError, match="disk"), interruptible():
        raise OSError("disk")


def test_benchmarks_end_what_they_have_started_when_they_are_interrupted() -> None:
    """All but those that are processes of others, which end with their parent."""
    mains = {
        path: each
        for path in BENCHMARKS.rglob("*.py")
        for each in ast.parse(path.read_text()).body
        if isinstance(each, ast.FunctionDef) and each.name == "main" and "end_with_parent()" not in ast.unparse(each)
    }
    assert len(mains) > 20
    hasty = [path for path, main in mains.items() if "interruptible()" not in map(ast.unparse, main.decorator_list)]
    assert not hasty
