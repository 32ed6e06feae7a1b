"""The terminal: results on stdout; progress, logs and errors on stderr; plain text where nobody looks."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from shoal.errors import UserError

# With NO_COLOR, Rich by itself would still write bold and dim.
_COLORS: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
stdout = Console(highlight=False, color_system=_COLORS)
stderr = Console(stderr=True, highlight=False, color_system=_COLORS)

PROGRESS = logging.getLogger("shoal.progress")
"""What is awaited, in plain lines, where no spinner can show it."""
LEAST_SECONDS = 5.0
"""Steps of one kind, such as the blocks that are loaded, get a line this often at most."""
REMIND_SECONDS = 30.0
"""What takes longer than this is named again, as often."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class WrongUsage(UserError):
    """The command line itself is wrong: exit status 2."""


def print_error(message: str, hint: str | None = None) -> None:
    """`error: ...` and, under it, `hint: ...`, one line each however long they are."""
    stderr.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)
    if hint:
        stderr.print(Text.assemble(("hint: ", "bold cyan"), " ".join(hint.split())), soft_wrap=True)


def start_logging(*, verbose: bool, default: str = "error", progress: bool = False) -> None:
    """Show shoal's own log from the level on that --verbose or $SHOAL_LOG ask for, and nobody else's.

    With `progress`, and unless $SHOAL_LOG says what is wanted, it has a line for whatever is awaited too, where stderr
    is no terminal: that is for commands that run for long.
    """
    tells = progress and not stderr.is_terminal and not os.environ.get("SHOAL_LOG")
    PROGRESS.setLevel(logging.INFO if tells else logging.NOTSET)
    name = "debug" if verbose else os.environ.get("SHOAL_LOG", "").lower() or default
    if name not in LEVELS:
        raise WrongUsage(f"SHOAL_LOG is {name!r}", hint=f"set it to one of {', '.join(LEVELS)}")
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
    _hush()


def is_debugging() -> bool:
    """Whether all details are wanted."""
    return logging.getLogger("shoal").isEnabledFor(logging.DEBUG)


def _hush() -> None:
    """Keep the libraries beneath, which are not imported yet, from writing to the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_debugging():
        warnings.simplefilter("ignore")
    # Whatever has no handler of its own ends at the root: let that be a silent one.
    logging.getLogger().addHandler(logging.NullHandler())


def hush_transformers() -> None:
    """Transformers' progress bars too; this imports it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class Wait:
    """Names what is awaited, with a spinner and the time that it has taken; in the log where stderr is no terminal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = Lines(clock)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stderr, transient=True
        )
        self._task = self._progress.add_task("")

    def for_(self, what: str, *, step: str = "", spin: bool = True) -> None:
        """From now on, wait for this, or for this `step` of it.

        Without `spin`, what is awaited draws a progress bar of its own.
        """
        if not stderr.is_terminal:
            if line := self._lines.next(what, step):
                PROGRESS.info("%s", line)
            return
        what = f"{what}: {step}" if step else what
        self._progress.update(self._task, description=what)
        if not spin:
            self.stop()
            stderr.print(Text(what, style="dim"))
        elif not self._progress.live.is_started:
            self._progress.reset(self._task)
            self._progress.start()

    def remind(self) -> None:
        """Name again what has been awaited for long; to be called now and then."""
        if not stderr.is_terminal and (line := self._lines.reminder()):
            PROGRESS.info("%s", line)

    def stop(self) -> None:
        """Nothing is awaited any more."""
        self._lines.end()
        if self._progress.live.is_started:
            self._progress.stop()


class Lines:
    """Which of the things that are awaited are worth a line: each of them, but not each of their steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._what = self._step = ""
        self._said_at = self._began_at = clock()

    def next(self, what: str, step: str = "") -> str | None:
        """The line for what is awaited from now on, if there is to be one."""
        now = self._clock()
        if what != self._what:
            self._began_at = now
        elif now - self._said_at < LEAST_SECONDS:
            self._step = step
            return None
        self._what, self._step, self._said_at = what, step, now
        return self._line()

    def reminder(self) -> str | None:
        """A line for what is awaited still, if none was said for long."""
        now = self._clock()
        if not self._what or now - self._said_at < REMIND_SECONDS:
            return None
        self._said_at = now
        return f"{self._line()} (for {now - self._began_at:.0f} s)"

    def end(self) -> None:
        """Nothing is awaited."""
        self._what = ""

    def _line(self) -> str:
        return f"{self._what}: {self._step}" if self._step else self._what


@contextlib.contextmanager
def waiting(what: str, *, spin: bool = True) -> Iterator[Wait]:
    """Show what is awaited until the context is left; `wait.for_(...)` names something else."""
    wait = Wait()
    wait.for_(what, spin=spin)
    try:
        yield wait
    finally:
        wait.stop()
