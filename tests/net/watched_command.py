"""A command as a user runs it, whose lines a test waits for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import psutil

SECONDS = 120.0
"""The limit for a wait. A test that reaches it fails."""
SHOAL = (sys.executable, "-m", "shoal")


class WatchedCommand:
    """A command, and the lines that it has written to both of its streams."""

    def __init__(
        self, *arguments: str, program: Sequence[str] = SHOAL, environment: Mapping[str, str] | None = None
    ) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def line(self, pattern: str, *, after: int = 0) -> re.Match[str]:
        """The first line that has this in it, as soon as it is written; of those `after` so many others."""

        def find() -> re.Match[str] | None:
            return next((found for line in self.lines[after:] if (found := re.search(pattern, line))), None)

        with self._changed:
            found = self._changed.wait_for(find, timeout=SECONDS)
        assert found is not None, "\n".join(self.lines)
        return found

    def children(self) -> list[psutil.Process]:
        """The processes that it has started and that run, in the order of their start."""
        found = psutil.Process(self.process.pid).children()
        return sorted(found, key=lambda each: (each.create_time(), each.pid))

    def end(self) -> None:
        """End it, if it still runs."""
        self.process.terminate()
        self.process.wait(SECONDS)
