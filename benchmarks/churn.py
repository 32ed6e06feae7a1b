"""Ten servers that join, leave, are killed, hang and are cut off, and three clients that talk through all of it.

    python -m benchmarks.churn [--seconds 1800] [--seed 0] [--every 8] [--logs FOLDER]

The servers are processes of their own, behind doors (docs/testing.md), with the bundled model in float32; each block is
held by three of them, with different cut points. Something happens to one of them every few seconds, at random, such
that every block always has a server that is well. Two of them, which others cut off and which hang, never die, so that
it can be seen whether they grow.

The clients are processes too. They have conversations of one to four turns, one after another: one client asks once
each time, one keeps spare servers warm and pauses between the turns, one keeps a bounded history in memory. Whatever
they are answered is compared with the tokens of plain Transformers on one machine.

Ends with status 1 if a sentence was not finished or has other tokens, a client or a server ended by itself or never
ended, the memory of a client or of one of the two servers grew by more than `MOST_GROWTH` after the first third of
the time, or pages of a cache are missing at the end.
"""

from __future__ import annotations

import argparse
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
import torch
import transformers

from benchmarks.conversations import Conversation, conversations, write_conversations
from benchmarks.machine import describe_machine
from benchmarks.soak import IDLE_SECONDS, MODEL, MOST_GROWTH, open_model
from benchmarks.soak_clients import SoakClients
from shoal.spans import Span
from shoal.testing import ShapedServer, ShapedSwarm, shaped_swarm
from shoal.testing.churn import CURES, Act, Event, churning, is_spared, random_churn

SPANS = ("0:4", "4:8", "8:12", "0:3", "3:6", "6:9", "9:12", "0:5", "5:10", "10:12")
STEADY = (2, 4)
"""These never die: what kills others cuts them off, and where others leave, they hang."""
CACHE_TOKENS = 2048
OPTIONS = ("--dtype", "float32", "--cache-tokens", str(CACHE_TOKENS), "--drain-timeout", "10")
ACTS = (Act.KILL, Act.STOP, Act.HANG, Act.CUT, Act.BLACK_HOLE)
DOWN_SECONDS = 12.0
SETTLE_SECONDS = 15.0
NUM_CONVERSATIONS = 48
SAMPLE_SECONDS = 5.0
REPORT_SECONDS = 30.0
LONG_GAP_SECONDS = 3.0
LAST_SENTENCE_SECONDS = 120.0
"""What a client gets for the conversation that it is in when the time is over."""


# -- what happens to the servers --------------------------------------------------------------------------------------


def without_deaths(events: Sequence[Event], steady: Sequence[int]) -> tuple[Event, ...]:
    """The same, but that these servers keep their process."""
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


class Guarded:
    """A swarm to which only happens what it can bear: a server may be slower to come back than was foreseen."""

    def __init__(self, swarm: ShapedSwarm) -> None:
        self.done = Counter[Act]()
        self.num_spared = 0
        self._swarm = swarm
        self._held = [Span.parse(server.span) for server in swarm.servers]
        self._down: set[int] = set()
        self._spared: set[int] = set()

    def do(self, server: int, act: Act) -> None:
        if act in CURES:
            well = [
                index for index, each in enumerate(self._swarm.servers) if index not in self._down and each.is_ready
            ]
            if server not in well or not is_spared(server, well, self._held):
                self._spared.add(server)
                self.num_spared += 1
                return
            self._down.add(server)
        elif server in self._spared:
            self._spared.remove(server)
            return
        else:
            self._down.remove(server)
        self._swarm.do(server, act)
        self.done[act] += 1

    def dead(self) -> list[ShapedServer]:
        """Servers that have ended, and were not told to."""
        return [
            each for index, each in enumerate(self._swarm.servers) if index not in self._down and not each.is_running
        ]


# -- what is looked at ------------------------------------------------------------------------------------------------


class Memory:
    """What processes take, with those that they have started, over time."""

    def __init__(self, processes: dict[str, int]) -> None:
        self._processes = processes
        self._samples: dict[str, list[tuple[float, int]]] = {name: [] for name in processes}

    def sample(self, passed: float) -> None:
        for name, pid in self._processes.items():
            try:
                process = psutil.Process(pid)
                family = [process, *process.children(recursive=True)]
                self._samples[name].append((passed, sum(each.memory_info().rss for each in family)))
            except psutil.NoSuchProcess:
                pass

    def last(self) -> dict[str, int]:
        return {name: samples[-1][1] for name, samples in self._samples.items() if samples}

    def growth(self, seconds: float) -> dict[str, tuple[int, int]]:
        """For each process, the most that it took in the first third of the time, and the most since."""
        found = {}
        for name, samples in self._samples.items():
            first = [rss for at, rss in samples if at <= seconds / 3]
            later = [rss for at, rss in samples if at > seconds / 3]
            if first and later:
                found[name] = max(first), max(later)
        return found


def missing_pages(swarm: ShapedSwarm) -> list[str]:
    """Servers that do not announce, within a minute of the last client's end, that their caches are empty."""
    model = open_model(swarm.address)
    blocks = model.transformer.h
    deadline = time.monotonic() + IDLE_SECONDS
    try:
        while True:
            found = blocks._runtime.run(blocks._swarm._node.directory.servers(blocks._swarm.model))
            left = {info.peer: info.cache_tokens_left for info in found}
            missing = [each.name for each in swarm.servers if left.get(each.peer) != CACHE_TOKENS]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(1)
    finally:
        model.close()


def watch(clients: SoakClients, guarded: Guarded, memory: Memory, seconds: float) -> None:
    """Look at everybody until all has happened and the clients have ended, or should have."""
    began = time.monotonic()
    print("   time  sentences  failed  differ  happened  worst gap  MiB: " + ", ".join(memory._processes))
    for turn in itertools.count(1):
        time.sleep(SAMPLE_SECONDS)
        passed = time.monotonic() - began
        is_over = passed > seconds + SAMPLE_SECONDS and not clients.are_running
        if is_over or passed > seconds + LAST_SENTENCE_SECONDS:
            return
        memory.sample(passed)
        if turn % (REPORT_SECONDS // SAMPLE_SECONDS) == 0:
            said = clients.sentences
            print(
                f"{passed:6.0f}s  {len(said):9}  {sum(each.failure is not None for each in said):6}"
                f"  {sum(each.difference is not None for each in said):6}  {guarded.done.total():8}"
                f"  {max((gap for each in said for gap in each.gaps), default=0.0):8.2f}s"
                f"  {' '.join(f'{rss / 2**20:.0f}' for rss in memory.last().values())}",
                flush=True,
            )


def judge(
    clients: SoakClients, guarded: Guarded, memory: Memory, missing: Sequence[str], logs: Path, seconds: float
) -> int:
    """Print what was seen; 1 if anything of it is wrong."""
    said = clients.sentences
    failed = [f"{client.name}: {each.failure}" for client in clients.all for each in client.sentences if each.failure]
    differing = [
        f"{client.name}: {each.difference}" for client in clients.all for each in client.sentences if each.difference
    ]
    gaps = [gap for each in said for gap in each.gaps]
    print(f"\n{len(said)} sentences, {len(failed)} failed, {len(differing)} with differing tokens")
    print("by client: " + ", ".join(f"{each.name} {len(each.sentences)}" for each in clients.all))
    print("events: " + ", ".join(f"{num} {act}" for act, num in guarded.done.items()), end="")
    print(f"; {guarded.num_spared} left out")
    if gaps:
        print(
            f"between two tokens: {1000 * statistics.median(gaps):.1f} ms in the median, {max(gaps):.2f} s at worst,"
            f" more than {LONG_GAP_SECONDS:.0f} s {sum(gap > LONG_GAP_SECONDS for gap in gaps)} times of {len(gaps)}"
        )
    growth = memory.growth(seconds)
    for name, (first, later) in growth.items():
        print(f"memory of {name}: {first / 2**20:.0f} MiB at most in the first third, {later / 2**20:.0f} since")
    faults = {
        "sentences were not finished; " + "; ".join(failed[:5]): failed,
        "sentences have other tokens; " + "; ".join(differing[:5]): differing,
        "a client said nothing": not all(each.sentences for each in clients.all),
        "a client failed or did not end: "
        + ", ".join(f"{each.name} {each.process.poll()}" for each in clients.all): any(
            each.process.poll() != 0 for each in clients.all
        ),
        "servers ended by themselves: " + ", ".join(each.name for each in guarded.dead()): guarded.dead(),
        "tracebacks in the logs of " + ", ".join(confused := with_tracebacks(logs)): confused,
        f"memory grew by more than {MOST_GROWTH >> 20} MiB": any(
            later - first > MOST_GROWTH for first, later in growth.values()
        ),
        "pages are missing at " + ", ".join(missing): missing,
    }
    for fault in (name for name, found_it in faults.items() if found_it):
        print(f"FAULT: {fault}")
    return int(any(faults.values()))


def with_tracebacks(logs: Path) -> list[str]:
    return sorted(log.stem for log in logs.glob("*.log") if "Traceback" in log.read_text(errors="replace"))


def soak(talks: list[Conversation], seconds: float, every: float, seed: int, logs: Path | None) -> int:
    """All of it; the exit status."""
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
        folder, guarded = swarm.children.folder, Guarded(swarm)
        file = folder / "talks.json"
        write_conversations(file, talks)
        try:
            with SoakClients(swarm.addresses, file, seconds, seed, folder) as clients:
                processes = {each.name: each.process.pid for each in clients.all}
                steady = {swarm.servers[index].name: swarm.servers[index].process.pid for index in STEADY}
                memory = Memory(processes | steady)
                clients.wait_until_running()
                with churning(guarded, events):
                    watch(clients, guarded, memory, seconds)
                for client in clients.all:
                    client.hear_out()
                swarm.wait_until_ready()
                return judge(clients, guarded, memory, missing_pages(swarm), folder, seconds)
        finally:
            if logs is not None:
                shutil.copytree(folder, logs, ignore=lambda _, names: [each for each in names if "." not in each])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--every", type=float, default=8, help="seconds from one failure to the next, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="a new folder for what everybody has logged")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(describe_machine(), flush=True)
    talks = conversations(MODEL, NUM_CONVERSATIONS, seed=arguments.seed)
    return soak(talks, arguments.seconds, arguments.every, arguments.seed, arguments.logs)


if __name__ == "__main__":
    sys.exit(main())
