"""Soak test: ten servers join, leave, are killed, hang and lose their network, while three clients use them.

    python -m benchmarks.soak.churn [--seconds 1800] [--seed 0] [--every 8] [--logs FOLDER]

Each server is a process behind a proxy (docs/testing.md), with blocks of the bundled model in float32. Three servers
hold each block, and their spans are cut at different blocks. Every few seconds a random event hits a server, chosen so
that every block always has a healthy server. Two servers never die, so that their memory can be followed: they only
hang or lose their network.

Each client is a process. It has one conversation of one to four turns after another. The client "plain" has one turn in
each, "standby" keeps standby servers warm and pauses between turns, and "bounded" limits the memory of its history. All
answers are compared with the tokens of plain Transformers on one machine.

The exit status is 1 if a turn failed or has other tokens, if a client or a server ended by itself or did not end, if
the memory of a client or of one of the two servers grew by more than `MAX_GROWTH` bytes after the first third of the
time, if one of them has processes left over, or if pages of a cache are missing at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.common.clients import announced
from benchmarks.common.conversations import Conversation, write_conversations
from benchmarks.soak.clients import SoakClients
from benchmarks.soak.options import soak_parser, soak_script
from benchmarks.soak.steady import IDLE_SECONDS, MAX_GROWTH, MODEL, open_model
from shoal.host.processes import interruptible
from shoal.spans import Span
from shoal.testing import ShapedServer, ShapedSwarm, shaped_swarm
from shoal.testing.churn import CURES, Act, Event, churning, is_redundant, random_churn

SPANS = ("0:4", "4:8", "8:12", "0:3", "3:6", "6:9", "9:12", "0:5", "5:10", "10:12")
STEADY = (2, 4)
"""Servers that never die: they lose their network where others are killed, and hang where others leave."""
CACHE_TOKENS = 2048
OPTIONS = ("--dtype", "float32", "--cache-tokens", str(CACHE_TOKENS), "--drain-timeout", "10")
ACTS = (Act.KILL, Act.STOP, Act.HANG, Act.CUT, Act.BLACK_HOLE)
DOWN_SECONDS = 12.0
SETTLE_SECONDS = 15.0
NUM_CONVERSATIONS = 48
SAMPLE_SECONDS = 5.0
REPORT_SECONDS = 30.0
LONG_GAP_SECONDS = 3.0
MAX_PROCESSES = 5
"""A server, its network daemon, the one that dials for other peers, and the process that watches each daemon."""
LAST_CONVERSATION_SECONDS = 120.0
"""How long a client may go on with its conversation after the end of the soak."""


# -- events of the servers ---------------------------------------------------------------------------------------------


def without_deaths(events: Sequence[Event], steady: Sequence[int]) -> tuple[Event, ...]:
    """The events, with milder ones for the servers in `steady`, whose processes have to live."""
    milder = {Act.KILL: Act.CUT, Act.STOP: Act.HANG}
    mildest: list[Event] = []
    last: dict[int, Act] = {}
    for event in events:
        if event.server in steady:
            is_cure = event.act in CURES.values()
            act = CURES[last[event.server]] if is_cure else milder.get(event.act, event.act)
            last[event.server] = act
            event = replace(event, act=act)
        mildest.append(event)
    return tuple(mildest)


class GuardedSwarm:
    """A swarm that skips events which would leave a block without a server, because another server restarts slowly."""

    def __init__(self, swarm: ShapedSwarm) -> None:
        self.done = Counter[Act]()
        self.num_skipped = 0
        self._swarm = swarm
        self._spans = [Span.parse(server.span) for server in swarm.servers]
        self._down: set[int] = set()
        self._skipped: set[int] = set()

    def do(self, server: int, act: Act) -> None:
        if act in CURES:
            healthy = [
                index for index, each in enumerate(self._swarm.servers) if index not in self._down and each.is_ready
            ]
            if server not in healthy or not is_redundant(server, healthy, self._spans):
                self._skipped.add(server)
                self.num_skipped += 1
                return
            self._down.add(server)
        elif server in self._skipped:
            self._skipped.remove(server)
            return
        else:
            self._down.remove(server)
        self._swarm.do(server, act)
        self.done[act] += 1

    def dead(self) -> list[ShapedServer]:
        """Servers that have ended without an event."""
        return [
            each for index, each in enumerate(self._swarm.servers) if index not in self._down and not each.is_running
        ]


# -- measurements ----------------------------------------------------------------------------------------------------


class Memory:
    """Resident memory over time of processes and of their descendants, in bytes.

    Growth is that of processes that are there at the first sample and in the last third of the time. A server has a
    second network daemon for the minute after a peer has asked it to dial: its memory is no growth, and `crowded` tells
    whether such ones stay.
    """

    def __init__(self, processes: dict[str, int]) -> None:
        self._processes = processes
        self._samples: dict[str, list[tuple[float, dict[int, int]]]] = {name: [] for name in processes}

    def sample(self, passed: float) -> None:
        for name, pid in self._processes.items():
            found: dict[int, int] = {}
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                for each in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found[each.pid] = each.memory_info().rss
            if pid in found:
                self._samples[name].append((passed, found))

    def last(self) -> dict[str, int]:
        return {name: sum(samples[-1][1].values()) for name, samples in self._samples.items() if samples}

    def growth(self, seconds: float) -> dict[str, tuple[int, int]]:
        """For each process, its maximum in the first third of the time, and its maximum after that."""
        found = {}
        for name, samples in self._samples.items():
            late = {pid for at, each in samples if at > 2 * seconds / 3 for pid in each}
            lasting = late.intersection(samples[0][1]) if samples else set()
            totals = [(at, sum(each.get(pid, 0) for pid in lasting)) for at, each in samples]
            first = [rss for at, rss in totals if at <= seconds / 3]
            later = [rss for at, rss in totals if at > seconds / 3]
            if first and later:
                found[name] = max(first), max(later)
        return found

    def crowded(self) -> list[str]:
        """Those that have more than `MAX_PROCESSES` processes at the end, themselves included."""
        return [name for name, samples in self._samples.items() if samples and len(samples[-1][1]) > MAX_PROCESSES]


def missing_pages(swarm: ShapedSwarm) -> list[str]:
    """Servers that do not announce an empty cache within `IDLE_SECONDS` after the last client."""
    model = open_model(swarm.address)
    deadline = time.monotonic() + IDLE_SECONDS
    try:
        while True:
            left = {info.peer: info.cache_tokens_left for info in announced(model)}
            missing = [each.name for each in swarm.servers if left.get(each.peer) != CACHE_TOKENS]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(1)
    finally:
        model.close()


def watch(clients: SoakClients, guarded: GuardedSwarm, memory: Memory, seconds: float) -> None:
    """Sample and report until the clients have ended, or should have ended."""
    began = time.monotonic()
    print("   time      turns  failed  differ    events  worst gap  MiB: " + ", ".join(memory._processes))
    for turn in itertools.count(1):
        time.sleep(SAMPLE_SECONDS)
        passed = time.monotonic() - began
        is_over = passed > seconds + SAMPLE_SECONDS and not clients.are_running
        if is_over or passed > seconds + LAST_CONVERSATION_SECONDS:
            return
        memory.sample(passed)
        if turn % (REPORT_SECONDS // SAMPLE_SECONDS) == 0:
            turns = clients.turns
            print(
                f"{passed:6.0f}s  {len(turns):9}  {sum(each.failure is not None for each in turns):6}"
                f"  {sum(each.difference is not None for each in turns):6}  {guarded.done.total():8}"
                f"  {max((gap for each in turns for gap in each.gaps), default=0.0):8.2f}s"
                f"  {' '.join(f'{rss / 2**20:.0f}' for rss in memory.last().values())}",
                flush=True,
            )


def judge(
    clients: SoakClients, guarded: GuardedSwarm, memory: Memory, missing: Sequence[str], logs: Path, seconds: float
) -> int:
    """Print the results. Returns the exit status."""
    turns = clients.turns
    failed = [f"{client.name}: {each.failure}" for client in clients.all for each in client.turns if each.failure]
    differing = [
        f"{client.name}: {each.difference}" for client in clients.all for each in client.turns if each.difference
    ]
    gaps = [gap for each in turns for gap in each.gaps]
    print(f"\n{len(turns)} turns, {len(failed)} failed, {len(differing)} with other tokens")
    print("by client: " + ", ".join(f"{each.name} {len(each.turns)}" for each in clients.all))
    print("events: " + ", ".join(f"{num} {act}" for act, num in guarded.done.items()), end="")
    print(f"; {guarded.num_skipped} skipped")
    if gaps:
        print(
            f"between two tokens: {1000 * statistics.median(gaps):.1f} ms (median), {max(gaps):.2f} s (worst);"
            f" {sum(gap > LONG_GAP_SECONDS for gap in gaps)} of {len(gaps)} above {LONG_GAP_SECONDS:.0f} s"
        )
    growth = memory.growth(seconds)
    for name, (first, later) in growth.items():
        print(
            f"memory of {name}: {first / 2**20:.0f} MiB in the first third, {later / 2**20:.0f} MiB after it (maxima)"
        )
    faults = {
        "turns failed; " + "; ".join(failed[:5]): failed,
        "turns have other tokens; " + "; ".join(differing[:5]): differing,
        "a client finished no turn": not all(each.turns for each in clients.all),
        "a client failed or did not end: "
        + ", ".join(f"{each.name} {each.process.poll()}" for each in clients.all): any(
            each.process.poll() != 0 for each in clients.all
        ),
        "servers ended by themselves: " + ", ".join(each.name for each in guarded.dead()): guarded.dead(),
        "tracebacks in the logs of " + ", ".join(broken := with_tracebacks(logs)): broken,
        f"memory grew by more than {MAX_GROWTH >> 20} MiB": any(
            later - first > MAX_GROWTH for first, later in growth.values()
        ),
        "processes are left at " + ", ".join(crowded := memory.crowded()): crowded,
        "pages are missing at " + ", ".join(missing): missing,
    }
    for fault in (name for name, found_it in faults.items() if found_it):
        print(f"FAULT: {fault}")
    return int(any(faults.values()))


def with_tracebacks(logs: Path) -> list[str]:
    return sorted(log.stem for log in logs.glob("*.log") if "Traceback" in log.read_text(errors="replace"))


def soak(script: list[Conversation], seconds: float, every: float, seed: int, logs: Path | None) -> int:
    """Run the soak test. Returns the exit status."""
    drawn = random_churn(
        SPANS,
        seconds=seconds,
        every_seconds=every,
        down_seconds=DOWN_SECONDS,
        settle_seconds=SETTLE_SECONDS,
        acts=ACTS,
        seed=seed,
    )
    events = without_deaths(drawn, STEADY)
    with shaped_swarm(MODEL, SPANS, options=OPTIONS) as swarm:
        folder, guarded = swarm.children.folder, GuardedSwarm(swarm)
        file = folder / "conversations.json"
        write_conversations(file, script)
        try:
            with SoakClients(swarm.addresses, file, seconds, seed, folder) as clients:
                processes = {each.name: each.process.pid for each in clients.all}
                steady = {swarm.servers[index].name: swarm.servers[index].process.pid for index in STEADY}
                memory = Memory(processes | steady)
                clients.wait_until_running()
                with churning(guarded, events):
                    watch(clients, guarded, memory, seconds)
                for client in clients.all:
                    client.read_rest()
                swarm.wait_until_ready()
                return judge(clients, guarded, memory, missing_pages(swarm), folder, seconds)
        finally:
            if logs is not None:
                shutil.copytree(folder, logs, ignore=lambda _, names: [each for each in names if "." not in each])


@interruptible()
def main() -> int:
    parser = soak_parser(__doc__, every=8, event="failure")
    arguments = parser.parse_args()
    script = soak_script(NUM_CONVERSATIONS, seed=arguments.seed)
    return soak(script, arguments.seconds, arguments.every, arguments.seed, arguments.logs)


if __name__ == "__main__":
    sys.exit(main())
