"""The terminal: results go to stdout; progress, logs and errors go to stderr. Output to a file or a pipe is plain."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from shoal.cli.terminal.notify import notify
from shoal.errors import UserError
from shoal.progress_log import PROGRESS, ProgressLog

# Given NO_COLOR, Rich drops the colors but still writes bold and dim.
_COLORS: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
stdout = Console(highlight=False, color_system=_COLORS)
stderr = Console(stderr=True, highlight=False, color_system=_COLORS)

LOOK_SECONDS = 1.0
"""How often it is looked for tasks that still run."""

UNKNOWN = "…"
"""Stands for a figure that was not measured."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


FAILED = 1
"""The exit status when a command could not do what it was asked for."""
WRONG_USAGE = 2
"""The exit status when the user has to change the command line or a file of options."""


class WrongUsage(UserError):
    """The arguments of the command are wrong. The exit status is `WRONG_USAGE`."""


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """In this context, the arguments are checked: a `UserError` about one is `WrongUsage`. Also a decorator.

    Service managers go by the exit status: what a user has to change is not tried again.
    """
    try:
        yield
    except WrongUsage:
        raise
    except UserError as error:
        raise WrongUsage(str(error), hint=error.hint) from error


def print_error(message: str, hint: str | None = None) -> None:
    """Print `error: ...` and, below it, `hint: ...`. Each is one line, which is not wrapped."""
    _print_with_hint(("error: ", "bold red"), message, hint)


def print_warning(message: str, hint: str | None = None) -> None:
    """The same with `warning: ...`."""
    _print_with_hint(("warning: ", "bold yellow"), message, hint)


def _print_with_hint(kind: tuple[str, str], message: str, hint: str | None) -> None:
    stderr.print(Text.assemble(kind, " ".join(message.split())), soft_wrap=True)
    if hint:
        stderr.print(Text.assemble(("hint: ", "bold cyan"), " ".join(hint.split())), soft_wrap=True)


def start_logging(*, verbose: bool, default: str = "error", progress: bool = False) -> None:
    """Show shoal's own log on stderr, and no other library's.

    The level is debug with --verbose, else that of $SHOAL_LOG, else `default`. Commands that run for a long time set
    `progress`: where stderr is not a terminal and $SHOAL_LOG is not set, progress lines are logged too. Raises
    `WrongUsage` for an unknown level.
    """
    logs_progress = progress and not stderr.is_terminal and not os.environ.get("SHOAL_LOG")
    PROGRESS.setLevel(logging.INFO if logs_progress else logging.NOTSET)
    name = "debug" if verbose else os.environ.get("SHOAL_LOG", "").lower() or default
    if name not in LEVELS:
        raise WrongUsage(f"SHOAL_LOG={name} is not a log level", hint=f"set it to one of {', '.join(LEVELS)}")
    handler: logging.Handler
    if stderr.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=stderr, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("shoal")
    logger.handlers = [handler]
    logger.setLevel(LEVELS[name])
    logger.propagate = False
    _hush_libraries()


def is_debugging() -> bool:
    """Whether shoal logs at the level debug."""
    return logging.getLogger("shoal").isEnabledFor(logging.DEBUG)


def _hush_libraries() -> None:
    """Keep the libraries from writing to the terminal. Called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_debugging():
        warnings.simplefilter("ignore")
    # Loggers without a handler of their own use the root logger's. This one writes nothing.
    logging.getLogger().addHandler(logging.NullHandler())


def hush_transformers() -> None:
    """Turn off Transformers' progress bars. This imports Transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class ProgressReporter:
    """Shows the current task on stderr: with a spinner and its duration on a terminal, as log lines elsewhere.

    systemd is told too, if it asked to be.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = ProgressLog(clock)
        self._lock = threading.Lock()  # of the log's decisions: reminders come from a thread
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stderr, transient=True
        )
        self._task = self._progress.add_task("")

    def show(self, task: str, *, step: str = "", spin: bool = True) -> None:
        """Show this task, or this `step` of it, in place of the one before.

        `spin` is False for a task that draws its own progress bar.
        """
        description = f"{task}: {step}" if step else task
        notify(STATUS=description)
        if not stderr.is_terminal:
            with self._lock:
                line = self._log.line_for(task, step)
            if line:
                PROGRESS.info("%s", line)
            return
        self._progress.update(self._task, description=description)
        if not spin:
            self.stop()
            stderr.print(Text(description, style="dim"))
        elif not self._progress.live.is_started:
            self._progress.reset(self._task)
            self._progress.start()

    def remind(self) -> None:
        """Log a task that has run for a long time again. To be called about once a second, from any thread."""
        with self._lock:
            line = self._log.reminder()
        if line:
            PROGRESS.info("%s", line)

    def stop(self) -> None:
        """Show no task any more."""
        with self._lock:
            self._log.clear()
        if self._progress.live.is_started:
            self._progress.stop()


@contextlib.contextmanager
def waiting(task: str, *, spin: bool = True) -> Iterator[ProgressReporter]:
    """Show a task until the context ends. The reporter's `show` replaces it with another task."""
    reporter = ProgressReporter()
    reporter.show(task, spin=spin)
    with contextlib.nullcontext() if stderr.is_terminal else _reminding(reporter):
        try:
            yield reporter
        finally:
            reporter.stop()


@contextlib.contextmanager
def _reminding(reporter: ProgressReporter) -> Iterator[None]:
    """Let a thread remind of tasks: while PyTorch is imported or weights are read, nothing else could."""
    ended = threading.Event()

    def remind() -> None:
        while not ended.wait(LOOK_SECONDS):
            reporter.remind()

    thread = threading.Thread(target=remind, name="shoal-reminders", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def figure(rate: float | None) -> str:
    """A rate without its unit, for a column of a table. It has three significant digits, or all before the point."""
    if not rate:
        return UNKNOWN
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def tokens_per_second(rate: float | None) -> str:
    """A rate of tokens, with its unit."""
    return f"{figure(rate)} tokens/s" if rate else "not measured"
