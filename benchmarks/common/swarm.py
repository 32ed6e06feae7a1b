"""A swarm for a benchmark: one `shoal serve` process for each span, on loopback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.host.processes import Child, Children

START_SECONDS = 900.0
"""A model of many gigabytes takes minutes to load."""
GRACE_SECONDS = 30.0
"""The time that a process gets to leave the swarm."""


def benchmarked() -> Children:
    """Processes as a benchmark has them: with as many threads as they choose, and with their logs on its stderr."""
    return Children(num_threads=None, grace_seconds=GRACE_SECONDS, shares_stderr=True)


def started(children: Children, name: str, *arguments: str) -> Child:
    """Start `shoal` with these arguments, and wait until it has printed its address. Raises `SwarmError`."""
    child = children.start(name, *arguments)
    for _ in children.wait_for([child], seconds=START_SECONDS):
        pass
    return child


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
    common = ("serve", str(model), "--host", "127.0.0.1", "--device", device, *options)
    with benchmarked() as children:
        address = ""
        for index, span in enumerate(spans):
            join = ("--initial-peers", address) if address else ("--new-swarm",)
            own = of_last if index == len(spans) - 1 else ()
            with contextlib.nullcontext() if cores is None else _only_on(cores[index]):
                server = started(children, f"server-{index}", *common, "--blocks", span, *join, *own)
            address = address or server.facts["address"]
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
