"""Stages of a model with several servers each, which fail at a given rate and can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = "benchmarks.failures.failing_server"


@dataclass
class FailingServer:
    """The process of one server. It ends when its stdin ends."""

    span: str
    process: subprocess.Popen[str]
    peer: str
    address: str

    @classmethod
    def start(cls, model: Path, span: str, peers: list[str], dtype: str, num_threads: int) -> FailingServer:
        joining = ["--initial-peers", *peers] if peers else []
        options = ["--blocks", span, "--dtype", dtype, "--threads", str(num_threads), *joining]
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, str(model), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        )
        try:
            facts = _read_line(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return cls(span, process, facts["peer"], facts["address"])

    def fail_at(self, rate: float, seed: int) -> int:
        """Forget everything and fail at this rate. Returns the number of failures since the last call."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rate": rate, "seed": seed}) + "\n")
        self.process.stdin.flush()
        return int(_read_line(self.process)["failures"])

    def end(self) -> None:
        """Let the server leave, and kill it after 20 s. May be called twice."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _read_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a server ended with status {process.wait()}")
    values: dict[str, Any] = json.loads(line)
    return values


class Stages:
    """All servers of all stages of a model."""

    def __init__(self, model: Path, dtype: str, num_threads: int) -> None:
        self._model = model
        self._dtype = dtype
        self._num_threads = num_threads
        self._servers: list[FailingServer] = []

    @property
    def address(self) -> str:
        """The address of a server, to join by."""
        return self._servers[0].address

    def add(self, span: str) -> None:
        peers = [server.address for server in self._servers]
        self._servers.append(FailingServer.start(self._model, span, peers, self._dtype, self._num_threads))
        print(f"serving {span}: {self._servers[-1].peer[-8:]}", file=sys.stderr)

    def fail_at(self, rate: float, seed: int) -> int:
        """Make all servers forget everything and fail at this rate. Returns their failures since the last call."""
        return sum(server.fail_at(rate, seed) for server in self._servers)

    def of_peer(self, peer: str) -> FailingServer:
        return next(server for server in self._servers if server.peer == peer)

    def replace(self, killed: FailingServer) -> None:
        """Start a new server in place of one that was killed."""
        killed.end()
        self._servers.remove(killed)
        self.add(killed.span)

    def end(self) -> None:
        for server in self._servers:
            server.end()


@contextlib.contextmanager
def stages_of(
    model: Path, num_blocks: int, *, dtype: str, num_stages: int = 4, servers_each: int = 2, num_threads: int = 1
) -> Iterator[Stages]:
    """Start the servers one after another, so that none disturbs another's measurement; end them with the context."""
    stages = Stages(model, dtype, num_threads)
    try:
        size = num_blocks // num_stages
        for _ in range(servers_each):
            for start in range(0, num_blocks, size):
                stages.add(f"{start}:{start + size}")
        yield stages
    finally:
        stages.end()
