"""Ten servers that join, leave, are killed, hang and are cut off, and three clients that talk through all of it.

    python benchmarks/churn.py [--seconds 1800] [--seed 0] [--every 8]

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
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from clients import generate
from conversations import Conversation, Turn, conversations
from machine import describe_machine
from soak import IDLE_SECONDS, MODEL, MOST_GROWTH, open_model

import shoal
from shoal import AutoDistributedModelForCausalLM
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
LAST_SENTENCE_SECONDS = 120.0
"""What a client gets for the conversation that it is in when the time is over."""

CLIENTS: dict[str, dict[str, Any]] = {"plain": {}, "standby": {"standby": True}, "bounded": {"history_memory": 1 << 16}}
LONGEST_PAUSE = {"plain": 0.5, "standby": 8.0, "bounded": 2.0}
"""Seconds between two turns."""


# -- what a client does -----------------------------------------------------------------------------------------------


def talk(name: str, addresses: list[str], talks: list[Conversation], seconds: float, seed: int) -> None:
    """Have conversations for so long; prints a line of JSON for each sentence."""
    chance, until = random.Random(f"{seed} {name}"), time.monotonic() + seconds
    if name == "plain":
        talks = [talks_[:1] for talks_ in talks]
    model = AutoDistributedModelForCausalLM.from_pretrained(
        MODEL, initial_peers=addresses, dtype=torch.float32, **CLIENTS[name]
    )
    while time.monotonic() < until:
        for sentence in converse(model, chance.choice(talks), chance, LONGEST_PAUSE[name]):
            print(json.dumps(asdict(sentence)), flush=True)
    model.close()


@dataclass(frozen=True)
class Sentence:
    """What came of a turn: the seconds between its tokens, whether they were the right ones, why it was given up."""

    gaps: list[float]
    is_right: bool
    failure: str | None = None


def converse(model: Any, talk: Conversation, chance: random.Random, longest_pause: float) -> Iterator[Sentence]:
    with model.inference_session(max_length=512) as session:
        for index, turn in enumerate(talk):
            if index:
                time.sleep(chance.uniform(0, longest_pause))
            try:
                generation = generate(model, torch.tensor([turn.said]), len(turn.answer), session=session)
            except shoal.ShoalError as error:
                yield Sentence([], False, f"{type(error).__name__}: {error}")
                return
            gaps = [round(seconds, 4) for _, seconds in generation.gaps()]
            yield Sentence(gaps, tuple(generation.tokens) == turn.answer)


@dataclass
class Client:
    """A process that talks, and what it has said so far."""

    name: str
    process: subprocess.Popen[str]
    sentences: list[Sentence] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.sentences.append(Sentence(**json.loads(line)))


class Crowd:
    """The clients; those that still run when the context is left are killed."""

    def __init__(self, addresses: Sequence[str], talks: Path, seconds: float, seed: int) -> None:
        self.clients: list[Client] = []
        self._words = ["--talks", str(talks), "--seconds", str(seconds), "--seed", str(seed), "--addresses", *addresses]

    def __enter__(self) -> Crowd:
        for name in CLIENTS:
            command = [sys.executable, __file__, "--talk", name, *self._words]
            client = Client(name, subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            self.clients.append(client)
            threading.Thread(target=client.read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.process.kill()
            client.process.wait()

    def wait_until_talking(self) -> None:
        """Until each has had its first sentence, or has ended."""
        while any(client.process.poll() is None and not client.sentences for client in self.clients):
            time.sleep(0.1)

    def are_talking(self) -> bool:
        return any(client.process.poll() is None for client in self.clients)

    def sentences(self) -> list[Sentence]:
        return [sentence for client in self.clients for sentence in client.sentences]


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
            found = blocks._runtime.run(blocks._chain._node.directory.servers(blocks._chain.model))
            left = {info.peer: info.cache_tokens_left for info in found}
            missing = [each.name for each in swarm.servers if left.get(each.peer) != CACHE_TOKENS]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(1)
    finally:
        model.close()


def watch(crowd: Crowd, guarded: Guarded, memory: Memory, seconds: float) -> None:
    """Look at everybody until the clients have ended, or should have."""
    began = time.monotonic()
    print("   time  sentences  failed  differ  happened  worst gap  MiB: " + ", ".join(memory._processes))
    for turn in itertools.count(1):
        time.sleep(SAMPLE_SECONDS)
        passed = time.monotonic() - began
        if not crowd.are_talking() or passed > seconds + LAST_SENTENCE_SECONDS:
            return
        memory.sample(passed)
        if turn % (REPORT_SECONDS // SAMPLE_SECONDS) == 0:
            said = crowd.sentences()
            print(
                f"{passed:6.0f}s  {len(said):9}  {sum(each.failure is not None for each in said):6}"
                f"  {sum(not each.is_right for each in said):6}  {guarded.done.total():8}"
                f"  {max((gap for each in said for gap in each.gaps), default=0.0):8.2f}s"
                f"  {' '.join(f'{rss / 2**20:.0f}' for rss in memory.last().values())}",
                flush=True,
            )


def judge(crowd: Crowd, guarded: Guarded, memory: Memory, missing: Sequence[str], logs: Path, seconds: float) -> int:
    """Print what was seen; 1 if anything of it is wrong."""
    said = crowd.sentences()
    failed = [each for each in said if each.failure is not None]
    differing = [each for each in said if each.failure is None and not each.is_right]
    gaps = [gap for each in said for gap in each.gaps]
    print(f"\n{len(said)} sentences, {len(failed)} failed, {len(differing)} with differing tokens")
    print("by client: " + ", ".join(f"{each.name} {len(each.sentences)}" for each in crowd.clients))
    print("events: " + ", ".join(f"{num} {act}" for act, num in guarded.done.items()), end="")
    print(f"; {guarded.num_spared} left out")
    if gaps:
        print(f"between two tokens: {1000 * statistics.median(gaps):.1f} ms in the median, {max(gaps):.2f} s at worst")
    growth = memory.growth(seconds)
    for name, (first, later) in growth.items():
        print(f"memory of {name}: {first / 2**20:.0f} MiB at most in the first third, {later / 2**20:.0f} since")
    faults = {
        "a sentence was not finished: " + "; ".join(sorted({str(each.failure) for each in failed})): failed,
        "sentences have other tokens": differing,
        "a client said nothing": not all(each.sentences for each in crowd.clients),
        "a client failed or did not end: "
        + ", ".join(f"{each.name} {each.process.poll()}" for each in crowd.clients): any(
            each.process.poll() != 0 for each in crowd.clients
        ),
        "servers ended by themselves: " + ", ".join(each.name for each in guarded.dead()): guarded.dead(),
        "servers show tracebacks: " + ", ".join(confused := with_tracebacks(logs)): confused,
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


def soak(talks: list[Conversation], seconds: float, every: float, seed: int) -> int:
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
    with shaped_swarm(MODEL, SPANS, options=OPTIONS) as swarm, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([[asdict(turn) for turn in turns] for turns in talks], file)
        file.flush()
        guarded = Guarded(swarm)
        with Crowd(swarm.addresses, Path(file.name), seconds, seed) as crowd:
            processes = {each.name: each.process.pid for each in crowd.clients}
            steady = {swarm.servers[index].name: swarm.servers[index].process.pid for index in STEADY}
            memory = Memory(processes | steady)
            crowd.wait_until_talking()
            with churning(guarded, events):
                watch(crowd, guarded, memory, seconds)
            swarm.wait_until_ready()
            return judge(crowd, guarded, memory, missing_pages(swarm), swarm.children.folder, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--every", type=float, default=8, help="seconds from one failure to the next, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--talk", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--talks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.talk:
        talks = [
            tuple(Turn(tuple(turn["said"]), tuple(turn["answer"])) for turn in turns)
            for turns in json.loads(arguments.talks.read_text())
        ]
        talk(arguments.talk, arguments.addresses, talks, arguments.seconds, arguments.seed)
        return 0
    print(describe_machine(), flush=True)
    return soak(
        conversations(MODEL, NUM_CONVERSATIONS, seed=arguments.seed), arguments.seconds, arguments.every, arguments.seed
    )


if __name__ == "__main__":
    sys.exit(main())
