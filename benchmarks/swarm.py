"""A swarm of real servers for a benchmark: one `shoal serve` process for each span, on loopback."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def servers(model: Path, spans: Sequence[str], *options: str, of_last: Sequence[str] = ()) -> Iterator[str]:
    """Start a server for each span and wait until all serve; yields an address to join by.

    All have the same options; the last one has those `of_last` as well.
    """
    with contextlib.ExitStack() as stack:
        address = ""
        for index, span in enumerate(spans):
            join = ("--initial-peers", address) if address else ("--new-swarm",)
            own = of_last if index == len(spans) - 1 else ()
            printed = _start(stack, model, span, *join, *options, *own)
            address = address or printed
        yield address


def _start(stack: contextlib.ExitStack, model: Path, span: str, *options: str) -> str:
    command = [sys.executable, "-m", "shoal", "serve", str(model), "--host", "127.0.0.1", "--blocks", span, *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("address"):
            return line.split()[1]
    raise SystemExit(f"the server of blocks {span} ended with status {server.wait()}")
