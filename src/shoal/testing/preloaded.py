"""Starts `shoal` in processes that need not import PyTorch each: forks of one process that has imported everything.

Importing takes a server six seconds of processor time, and the rest of its start less than one. A fork is a process of
its own in all that it does, and shares only the memory of the code.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

PRELOADED = (
    *("torch", "shoal.cli.serve", "shoal.server.server", "peft", "bitsandbytes"),
    *("shoal.net.libp2p.libp2p_transport", "shoal.net.libp2p.hash_table.dht_directory"),
    *("shoal.net.libp2p.duplicate_identity", __name__),
)
"""What `shoal serve` imports. These are names: the modules are imported in the process that is forked only."""


class PreloadedProcess:
    """A process with the methods of `subprocess.Popen` that `shoal.host.processes` needs.

    It calls `prepare` before all else, which is sent to it: a module must have the function.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        its_stdin, stdin = context.Pipe(duplex=False)
        stdout, its_stdout = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_become_shoal, args=([*arguments], {**environment}, its_stdin, its_stdout, str(log), prepare)
        )
        self._process.start()
        its_stdin.close()
        its_stdout.close()
        self.stdin: TextIO = os.fdopen(os.dup(stdin.fileno()), "w")
        self.stdout: TextIO = os.fdopen(os.dup(stdout.fileno()))
        self.stderr: TextIO | None = None  # its log has it
        stdin.close()
        stdout.close()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status; `None` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("shoal", timeout or 0.0)
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self._process.kill()


def _become_shoal(
    arguments: list[str],
    environment: dict[str, str],
    stdin: Connection,
    stdout: Connection,
    log: str,
    prepare: Callable[[], None] | None,
) -> None:
    """In the fork: what the system does for a program that is started, and then `shoal`."""
    os.setsid()
    if prepare is not None:
        prepare()
    os.dup2(stdin.fileno(), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    stdin.close()
    stdout.close()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the folder for temporary files is the one that this environment names
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["shoal", *arguments]
    multiprocessing.set_start_method(None, force=True)  # for its own processes, the one of the system
    runpy.run_module("shoal", run_name="__main__", alter_sys=True)
