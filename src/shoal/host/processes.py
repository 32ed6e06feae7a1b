"""Child processes that run `shoal` and that do not outlive this process.

The stdin of each child is a pipe from this process, and the child runs with `--exit-with-stdin`. When this process
ends, even by SIGKILL, the pipe closes and the children exit. Each child is in a session of its own, so that Ctrl-C
reaches only this process, which then ends the children in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol, Self

from shoal.errors import SwarmError

GRACE_SECONDS = 3.0
"""The time that a child gets to exit after SIGTERM, before it is killed, unless it needs more."""
END_SECONDS = 5.0
"""The time that the processes a child has started get to exit after it."""
LOOK_SECONDS = 1.0
"""While a parent waits for children to be ready, it looks at other things as often."""


class Process(Protocol):
    """What a child needs of `subprocess.Popen`. Its stdin and stdout are pipes, and its stderr if it is to be told."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | Any: ...
    @property
    def stdin(self) -> IO[str] | None: ...
    @property
    def stdout(self) -> IO[str] | None: ...
    @property
    def stderr(self) -> IO[str] | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


Launch = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts `shoal` with these arguments, in this environment; it writes its stderr into this file."""


@dataclass
class Child:
    """A `shoal` process. `facts` are the lines that it has printed, by their first word, such as its address."""

    name: str
    process: Process
    log: Path
    facts: dict[str, str] = field(default_factory=dict)
    has_ended: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it has printed its address."""
        return "address" in self.facts

    def kill(self) -> None:
        """End it at once by SIGKILL, as a power cut would."""
        self.process.kill()
        self.process.wait()

    def failure(self) -> SwarmError:
        """The error to raise when it ended too early, with the error and the hint from its log."""
        code = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
        hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
        reason = f": {errors[-1]}" if errors else ""
        return SwarmError(f"{self.name} ended with status {code}{reason}", hint=hints[-1] if hints else None)


Tell = Callable[[Child, str, bool], None]
"""Called with a child, a line that it wrote, and whether that was on stderr."""


class Children:
    """A context in which processes are started. On exit, they and the processes that they started are ended.

    Each process computes with `num_threads` threads; None leaves the number to PyTorch. The default is 1, because the
    processes share the cores: a second thread would often only spin while it waits for a busy core. With
    `shares_stderr`, what they report appears where this process reports; otherwise it goes into their logs only.
    `tell` is called with each line that a child reports, in place of that, from a thread of each child.
    """

    def __init__(
        self,
        *,
        num_threads: int | None = 1,
        grace_seconds: float = GRACE_SECONDS,
        shares_stderr: bool = False,
        tell: Tell | None = None,
    ) -> None:
        self.running: list[Child] = []
        self._num_threads = num_threads
        self._grace_seconds = grace_seconds
        self._shares_stderr = shares_stderr
        self._tell = tell
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-")
        self.folder = Path(self._folder.name)
        return self

    def start(
        self,
        name: str,
        *arguments: str,
        within: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        launch: Launch | None = None,
    ) -> Child:
        """Start `shoal` with these arguments. `name` is for messages and the log file.

        `within`: words before the command, of a program that becomes it, such as `nsenter`. `environment`: variables
        that it has beside those of this process. Secrets belong there: all users of a machine can read the arguments.
        `launch` starts it in another way than by running Python. Then there is no command for words to be before, and
        what it reports goes into its log only.
        """
        environment = {**os.environ, "NO_COLOR": "1", **(environment or {})}
        for each in ("SHOAL_INITIAL_PEERS", "SHOAL_SWARM_KEY", "NOTIFY_SOCKET"):  # these are for this process
            environment.pop(each, None)
        if self._num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._num_threads)
        log = self.folder / f"{name}.log"
        arguments = (*arguments, "--exit-with-stdin")
        if launch is not None:
            assert not within
            assert self._tell is None
            assert not self._shares_stderr
            process = launch(arguments, environment, log)
        else:
            process = self._run([*within, sys.executable, "-m", "shoal", *arguments], environment, log)
        child = Child(name, process, log)
        self.running.append(child)
        reporting = None
        if self._tell is not None:
            reporting = threading.Thread(target=_pass_on, args=(child, self._tell), daemon=True)
            reporting.start()
        threading.Thread(target=self._read, args=(child, reporting), daemon=True).start()
        return child

    def _run(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
        with log.open("w") as file:
            return subprocess.Popen(  # noqa: S603 - our own program
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if self._tell else None if self._shares_stderr else file,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            )

    def _read(self, child: Child, reporting: threading.Thread | None) -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            if self._tell is not None:
                self._tell(child, line.rstrip("\n"), False)
            fact, _, value = line.rstrip("\n").partition(" ")
            with self._changed:
                child.facts.setdefault(fact, value.strip())
                self._changed.notify_all()
        if reporting is not None:
            reporting.join()  # what it said last is in its log before it counts as ended
        with self._changed:
            child.has_ended = True
            self._changed.notify_all()

    def wait_for(self, children: Sequence[Child], *, seconds: float) -> Iterator[list[Child]]:
        """Wait until all children are ready. Yields those that are not: first, after each change, and each second, so
        that the caller can look whether it was interrupted.

        Raises `SwarmError` if a child ends, or if `seconds` pass.
        """
        until = time.monotonic() + seconds
        while waiting := [child for child in children if not child.is_ready]:
            yield waiting
            with self._changed:
                if not any(child.is_ready or child.has_ended for child in waiting):
                    self._changed.wait(min(LOOK_SECONDS, until - time.monotonic()))
            if time.monotonic() >= until:
                names = ", ".join(child.name for child in waiting)
                raise SwarmError(
                    f"{names} did not start within {seconds:.0f} s", hint="is this machine busy with other work?"
                )
            for child in waiting:
                if child.has_ended and not child.is_ready:
                    raise child.failure()

    def wait_for_news(self, seconds: float) -> None:
        """Wait until a child has printed something or has ended, for `seconds` at most."""
        with self._changed:
            self._changed.wait(seconds)

    def forget(self, child: Child) -> None:
        """Have nothing more to do with a child that has ended."""
        child.process.wait()
        assert child.process.stdin is not None
        with contextlib.suppress(OSError):
            child.process.stdin.close()
        self.running.remove(child)

    def __exit__(self, *_: object) -> None:
        with _ignoring_interrupts():
            self._stop()
            self._folder.cleanup()

    def _stop(self) -> None:
        import psutil  # here, because it takes a tenth of the time of `shoal --help`

        descendants = [
            process
            for child in self.running
            if child.process.poll() is None
            for process in psutil.Process(child.process.pid).children(recursive=True)
        ]
        for child in self.running:
            child.process.terminate()
        until = time.monotonic() + self._grace_seconds
        for child in self.running:
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
            assert child.process.stdin is not None
            with contextlib.suppress(OSError):
                child.process.stdin.close()
        _, remaining = psutil.wait_procs(descendants, timeout=END_SECONDS)
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _pass_on(child: Child, tell: Tell) -> None:
    """Pass on what a child writes to stderr, and keep it in its log."""
    assert child.process.stderr is not None
    with child.log.open("a") as log:
        for line in child.process.stderr:
            log.write(line)
            tell(child, line.rstrip("\n"), True)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """In this context, SIGTERM and a closed terminal raise `KeyboardInterrupt`, as Ctrl-C does, so that contexts exit.

    A library may swallow the exception. Therefore the function that this yields raises it again. The caller calls it
    now and then; it is also called at the end of the context. What fails after an interrupt, such as something that is
    closed in the middle of its work, counts as the interrupt too.
    """
    interrupted = False

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    with _with_handlers({signal.SIGTERM: interrupt, signal.SIGHUP: interrupt, signal.SIGINT: interrupt}):
        try:
            yield check
        except Exception:  # whatever an interrupt has broken
            check()
            raise
        check()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """In this context, ignore interrupts: the process is ending already, which takes a few seconds at most."""
    with _with_handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _with_handlers(handlers: dict[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
