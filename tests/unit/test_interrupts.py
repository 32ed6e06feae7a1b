"""What a command makes of Ctrl-C, SIGTERM and a closed terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from shoal.host.processes import interruptible

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


def test_an_error_without_an_interrupt_is_that_error() -> None:
    with pytest.raises(OSError, match="disk"), interruptible():
        raise OSError("disk")
