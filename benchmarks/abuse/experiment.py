"""One attack on servers that are started for it: the honest client alone and under attack, and the servers' memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Self

import psutil

from benchmarks.abuse.attacks import Attack
from benchmarks.abuse.full_caches import CACHE_TOKENS
from benchmarks.abuse.honest_client import Experience
from benchmarks.common.machine import cpu_seconds
from shoal.bundled import STORIES
from shoal.host.processes import Child, Children

BEGIN_SECONDS = 300.0
"""An attack is measured when it says that it is in full swing, and at the latest after this time."""
START_SECONDS = 120.0
LOOK_SECONDS = 0.2
MIN_SHARE = 0.8
SPARE_BYTES = 64 << 20
MAX_GAP = 5.0
FORM = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--no-lan", "--cache-tokens", str(CACHE_TOKENS))


@dataclass(frozen=True)
class Outcome:
    """What an attack did. `before` and `peak` are bytes: the most that one server had, with its libp2p daemon.

    They are those of the server that grew most, whose cache was full before. `beside_work` is what the client had while
    a process with nothing to do with the swarm computed as much as the attacker did: `attacker_load` cores, on average.
    """

    attack: Attack
    alone: Experience
    attacked: Experience
    beside_work: Experience
    attacker_load: float
    before: int
    peak: int

    @property
    def share(self) -> float:
        """The speed under attack as a part of what the client is due, on cores that the attacker uses too."""
        return self.attacked.speed / (self.beside_work.speed * self.attack.fair_share)

    def faults(self) -> list[str]:
        """The goals that were missed."""
        gap, first, more = self.attacked.longest_gap, self.attacked.first, self.peak - self.before
        goals = {
            f"{self.share:.2f} of its share": self.share >= MIN_SHARE,
            f"{first:.1f} s until the first token": first <= self.alone.first + MAX_GAP,
            f"{gap:.1f} s without a token": gap <= MAX_GAP,
            f"{more >> 20} MiB more": more <= self.attack.budget_bytes + SPARE_BYTES,
        }
        faults = [fault for fault, is_kept in goals.items() if not is_kept]
        return faults + [f"told: {failure}" for failure in self.attacked.failures]


def run(module: str, attack: Attack, *, seconds: float) -> Outcome:
    """Start the servers, measure the client for `seconds` alone, under attack, and beside equal work of no attacker."""
    with Children() as children:
        servers = _started(children, attack)
        addresses = [server.facts["address"] for server in servers]
        _fill_caches(addresses)
        _client(addresses, seconds / 2)  # the first tokens of new servers are slow
        alone = _client(addresses, seconds)
        if not alone.num_tokens:
            raise SystemExit(f"{attack.name}: no client gets a token, also without an attack")
        with _Memory(servers) as memory, _attacking(module, attack, addresses) as attacker:
            began, used = time.perf_counter(), cpu_seconds(attacker)
            attacked = _client(addresses, seconds)
            load = (cpu_seconds(attacker) - used) / (time.perf_counter() - began)
        with contextlib.ExitStack() as working:
            for _ in range(math.ceil(load)):
                working.enter_context(_process("equal_work", f"{load / math.ceil(load):.3f}"))
            beside_work = _client(addresses, seconds)
        return Outcome(attack, alone, attacked, beside_work, load, *memory.of_the_one_that_grew_most())


def _started(children: Children, attack: Attack) -> list[Child]:
    servers: list[Child] = []
    for index, span in enumerate(attack.spans):
        join = ("--initial-peers", servers[0].facts["address"]) if servers else ("--new-swarm",)
        options = (*FORM, "--blocks", span, *join, *attack.options)
        servers.append(children.start(f"server-{index}", "serve", str(STORIES), *options))
        for _ in children.wait_for(servers, seconds=START_SECONDS):
            pass
    return servers


def _client(addresses: Sequence[str], seconds: float) -> Experience:
    """What an honest client had that came now: nothing, if it never ended."""
    with _process("honest_client", str(seconds), *addresses) as client:
        told = _line(client, seconds + START_SECONDS)
        if not told:
            return Experience(0, seconds, seconds, 0.0, ("nothing: SHOAL_ABUSE_LOG=1 shows why",))
        found = json.loads(told)
        return Experience(**found | {"failures": tuple(found["failures"])})


def _fill_caches(addresses: Sequence[str]) -> None:
    """Let each server use all of its cache once: that is memory which it was told to use."""
    with _process("full_caches", *addresses) as filler:
        if _line(filler, START_SECONDS) != "full":
            print("the caches were not filled: the memory of attacks includes theirs", file=sys.stderr)


@contextlib.contextmanager
def _attacking(module: str, attack: Attack, addresses: Sequence[str]) -> Iterator[psutil.Process]:
    with _process("attacker", module, attack.name, *addresses) as attacker:
        if _line(attacker, BEGIN_SECONDS) != "begun":
            print(f"{attack.name}: it is not in full swing after {BEGIN_SECONDS:.0f} s", file=sys.stderr)
        yield psutil.Process(attacker.pid)
        if attacker.poll():
            print(f"{attack.name}: the attacker failed with status {attacker.returncode}", file=sys.stderr)


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this package, which ends with the context, and with this process."""
    command = [sys.executable, "-m", f"benchmarks.abuse.{module}", *arguments]
    log = None if os.environ.get("SHOAL_ABUSE_LOG") else subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line that a process prints; empty if it prints none in this time, or has ended."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline().strip() if ready else ""


class _Memory:
    """Looks at the memory of servers all the time, while it is entered."""

    def __init__(self, servers: Sequence[Child]) -> None:
        self._servers = [psutil.Process(server.process.pid) for server in servers]
        self._before = [_resident(server) for server in self._servers]
        self._peaks = list(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def of_the_one_that_grew_most(self) -> tuple[int, int]:
        """Its bytes before, and the most of them."""
        return max(zip(self._before, self._peaks, strict=True), key=lambda pair: pair[1] - pair[0])

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._peaks = [max(peak, _resident(each)) for peak, each in zip(self._peaks, self._servers, strict=True)]


def _resident(server: psutil.Process) -> int:
    """The bytes of memory of a server and of the processes that it started; 0 if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        total: int = sum(each.memory_info().rss for each in (server, *server.children(recursive=True)))
        return total
    return 0


def print_table(outcomes: Sequence[Outcome], out: IO[str]) -> None:
    """One line for each attack."""
    columns = (
        "attack",
        "alone, tokens/s",
        "attacked",
        "beside equal work",
        "attacker's load, cores",
        "share",
        "first token",
        "longest gap",
        "memory before / most",
        "verdict",
    )
    rows = [columns, ("---",) * len(columns)]
    for each in outcomes:
        memory = f"{each.before >> 20} / {each.peak >> 20} MiB"
        speeds = tuple(f"{one.speed:.1f}" for one in (each.alone, each.attacked, each.beside_work))
        shares = f"{each.attacker_load:.2f}", f"{each.share:.2f}"
        verdict = "; ".join(each.faults()) or "held"
        waits = f"{each.alone.first:.1f} / {each.attacked.first:.1f} s", f"{each.attacked.longest_gap:.1f} s"
        rows.append((each.attack.name, *speeds, *shares, *waits, memory, verdict))
    for row in rows:
        print(f"| {' | '.join(row)} |", file=out, flush=True)
