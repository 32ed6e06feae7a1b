"""A swarm for a benchmark: one `shoal serve` process for each span, on loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def servers(
    model: Path,
    spans: Sequence[str],
    *options: str,
    of_last: Sequence[str] = (),
    cores: Sequence[int] | None = None,
    device: str = "cpu",
) -> Iterator[str]:
    """Start a server for each span and wait until all are ready. Yields the first server's address.

    All have the same options, and the last one also those in `of_last`. With `cores`, each runs on its own core. All
    compute on one `device`.
    """
    with contextlib.ExitStack() as stack:
        address = ""
        for index, span in enumerate(spans):
            join = ("--initial-peers", address) if address else ("--new-swarm",)
            own = of_last if index == len(spans) - 1 else ()
            with contextlib.nullcontext() if cores is None else _only_on(cores[index]):
                printed = _start(stack, model, span, "--device", device, *join, *options, *own)
            address = address or printed
        yield address


@contextlib.contextmanager
def _only_on(core: int) -> Iterator[None]:
    """Bind processes that this thread starts in the context, and their children, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _start(stack: contextlib.ExitStack, model: Path, span: str, *options: str) -> str:
    placed = ("--host", "127.0.0.1", "--blocks", span)
    command = [sys.executable, "-m", "shoal", "serve", str(model), *placed, *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("address"):
            return line.split()[1]
    raise SystemExit(f"the server of blocks {span} ended with status {server.wait()}")
