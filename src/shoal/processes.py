"""`shoal` processes that belong to this one, and none of which outlives it.

Each is given the reading end of a pipe as its stdin and `--exit-with-stdin`: when we are gone, even by SIGKILL, the
pipe ends and so do they. They are in sessions of their own, so that a Ctrl-C reaches us alone and we end them in order.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from shoal.errors import SwarmError

GRACE_SECONDS = 3.0
"""What a process gets for saying goodbye."""
END_SECONDS = 5.0
"""What those that it has started get for noticing that it is gone."""


@dataclass
class Child:
    """A `shoal` process. `facts` are the lines that it has printed, by their first word: its peer, its address."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, str] = field(default_factory=dict)
    has_ended: bool = False

    @property
    def is_ready(self) -> bool:
        return "address" in self.facts

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def failure(self) -> SwarmError:
        """What to say when it ended before its time: what it said itself."""
        code = self.process.wait()
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[-1:]
        hints = [line.removeprefix("hint: ") for line in said if line.startswith("hint: ")]
        reason = f": {errors[-1]}" if errors else ""
        return SwarmError(f"{self.name} ended with status {code}{reason}", hint=hints[-1] if hints else None)


class Children:
    """A context in which processes are started; all of them, and theirs, are gone when it is left.

    Each has `num_threads` to compute with, unless it is told otherwise; None leaves that to PyTorch. They share the
    cores with each other: a second thread each would often only wait, spinning, for a busy core.
    """

    def __init__(self, *, num_threads: int | None = 1) -> None:
        self.running: list[Child] = []
        self._num_threads = num_threads
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-")
        self.folder = Path(self._folder.name)
        return self

    def start(self, name: str, *arguments: str) -> Child:
        """Run `shoal` with these arguments."""
        environment = dict(os.environ, NO_COLOR="1")
        environment.pop("SHOAL_INITIAL_PEERS", None)
        if self._num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._num_threads)
        log = self.folder / f"{name}.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "shoal", *arguments, "--exit-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                start_new_session=True,
            )
        child = Child(name, process, log)
        self.running.append(child)
        threading.Thread(target=self._read, args=(child,), daemon=True).start()
        return child

    def _read(self, child: Child) -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            fact, _, value = line.rstrip("\n").partition(" ")
            with self._news:
                child.facts.setdefault(fact, value.strip())
                self._news.notify_all()
        with self._news:
            child.has_ended = True
            self._news.notify_all()

    def wait_for(self, children: Sequence[Child], *, seconds: float) -> Iterator[list[Child]]:
        """Yield those that are not ready yet, each time that one of them is.

        Raises `SwarmError` when one ends instead, or if it takes longer than `seconds`.
        """
        until = time.monotonic() + seconds
        while waiting := [child for child in children if not child.is_ready]:
            yield waiting
            with self._news:
                while not any(child.is_ready or child.has_ended for child in waiting) and time.monotonic() < until:
                    self._news.wait(until - time.monotonic())
            if time.monotonic() >= until:
                names = ", ".join(child.name for child in waiting)
                raise SwarmError(
                    f"{names} did not start within {seconds:.0f} s", hint="is this machine busy with other work?"
                )
            for child in waiting:
                if child.has_ended and not child.is_ready:
                    raise child.failure()

    def __exit__(self, *_: object) -> None:
        with _undisturbed():
            self._stop()
            self._folder.cleanup()

    def _stop(self) -> None:
        descendants = [
            process
            for child in self.running
            if child.process.poll() is None
            for process in psutil.Process(child.process.pid).children(recursive=True)
        ]
        for child in self.running:
            child.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
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


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and a closed terminal end us as Ctrl-C does: by an exception, so that contexts are left.

    The exception may come up where a library swallows it. So it is raised again by what this yields, which is to be
    called now and then, and at the end.
    """
    interrupted = False

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    with _handling({signal.SIGTERM: interrupt, signal.SIGHUP: interrupt, signal.SIGINT: interrupt}):
        yield check
        check()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore what would interrupt us: what we do now is what it asks for, and takes a few seconds at most."""
    with _handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _handling(handlers: dict[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
