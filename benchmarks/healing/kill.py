"""How a swarm of real processes heals, and how it starts.

    python -m benchmarks.healing.kill [--runs 3] [--starts 20] [--servers 4]

`--runs`: three clients generate while the only holder of some blocks is killed. Another server moves to these blocks.
The table has the longest time between two tokens of each client, and how long the server that moved took to load. The
goal is a gap of at most that and 5 seconds. All tokens are compared with those of plain Transformers.

`--starts`: servers start at the same moment, again and again, and each chooses its blocks. Every block has to have a
holder as soon as all of them serve.

Each server is a process on loopback, with blocks of the bundled model in float32. The exit status is 1 if a token
differs, a client fails, a gap is too long, or a start leaves a hole.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import shoal
from benchmarks.common.clients import Generation, generate
from benchmarks.common.machine import describe_machine
from benchmarks.soak.clients import difference
from shoal import AutoDistributedModelForCausalLM
from shoal.cli.status import look
from shoal.client.options.client_options import ClientOptions
from shoal.host.processes import Child, Children, interruptible
from shoal.peers import ServerInfo, ServerState
from shoal.policy.view import SwarmView

MODEL = Path(shoal.__file__).parent / "bundled" / "stories"
NUM_BLOCKS = 12
NUM_TOKENS = 300
"""Tokens of each client: enough to go on until long after the swarm has healed."""
TOKEN_SECONDS = 0.03
"""How long a client waits after each token, as people read."""
TOKENS_BEFORE = 40
"""Every client has got this many tokens when the server is killed."""
GOAL_SECONDS = 5.0
"""A gap may take this much longer than loading takes."""
START_SECONDS = 180.0
NEAR_TIE = 1e-2
"""Two logits that are closer than this could be swapped by rounding. Prompts that lead to such a choice are unused."""
OPTIONS = ("--dtype", "float32", "--host", "127.0.0.1", "--device", "cpu", "--cache-tokens", "4096")


# -- the swarm ---------------------------------------------------------------------------------------------------------


class Processes:
    """The processes of one swarm: a peer without blocks, to which the others go first, and servers."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._introducer = children.start("introducer", "dht", "--host", "127.0.0.1")
        self.wait(self._introducer)

    @property
    def folder(self) -> Path:
        """Where the logs are."""
        return self._children.folder

    @property
    def address(self) -> str:
        return self._introducer.facts["address"]

    def begin(self, name: str, *options: str) -> Child:
        """Start a server, without waiting until it serves."""
        arguments = ("serve", str(MODEL), "--initial-peers", self.address, "--name", name)
        return self._children.start(name, *arguments, *OPTIONS, *options)

    def start(self, name: str, *options: str) -> Child:
        child = self.begin(name, *options)
        self.wait(child)
        return child

    def wait(self, *children: Child) -> None:
        for _ in self._children.wait_for(children, seconds=START_SECONDS):
            pass

    def stop(self, child: Child) -> None:
        child.process.terminate()
        child.process.wait()

    def servers(self) -> tuple[ServerInfo, ...]:
        """The servers that the directory names."""
        found = asyncio.run(look(ClientOptions(initial_peers=(self.address,))))
        return found[0].view.servers if found else ()


@contextlib.contextmanager
def swarm() -> Iterator[Processes]:
    with Children() as children:
        yield Processes(children)


def missing(servers: Sequence[ServerInfo]) -> list[int]:
    """The blocks that no server serves."""
    return SwarmView(NUM_BLOCKS, tuple(servers)).online().missing()


# -- clients -----------------------------------------------------------------------------------------------------------


@dataclass
class ReadingClient:
    """A client that generates in a thread of its own, as fast as people read, and the tokens that are right."""

    model: Any
    prompt: torch.Tensor
    expected: list[int]
    num_tokens: int = 0
    generation: Generation | None = None
    failure: str | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._generate, daemon=True)
        self._thread.start()

    def _generate(self) -> None:
        try:
            self.generation = generate(self.model, self.prompt, NUM_TOKENS, came=self._count)
        except shoal.ShoalError as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _count(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        time.sleep(TOKEN_SECONDS)

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def gap(self) -> float:
        """The longest time between two tokens."""
        assert self.generation is not None
        return max(seconds for _, seconds in self.generation.gaps())

    @property
    def fault(self) -> str | None:
        """What went wrong, if anything."""
        if self.failure is not None or self.generation is None:
            return self.failure or "it did not end"
        return difference(self.generation.tokens, self.expected)


def dialogues(count: int) -> list[tuple[torch.Tensor, list[int]]]:
    """Prompts, each with what plain Transformers answers greedily in float32."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    found: list[tuple[torch.Tensor, list[int]]] = []
    generator = torch.Generator().manual_seed(0)
    while len(found) < count:
        prompt = torch.randint(3, 1000, (1, 12), generator=generator)
        output = whole.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        margins = [float(top[0] - top[1]) for top in (scores[0].topk(2).values for scores in output.scores)]
        if min(margins) > NEAR_TIE:
            found.append((prompt, output.sequences[0, prompt.shape[1] :].tolist()))
    return found


# -- a hole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Healing:
    """What happened after a kill, in seconds: until the directory named a new holder, and how long that one loaded."""

    mover: str
    healed: float
    loading: float
    gaps: tuple[float, ...]
    faults: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return not self.faults and max(self.gaps, default=float("inf")) <= self.loading + GOAL_SECONDS


def heal(script: Sequence[tuple[torch.Tensor, list[int]]]) -> Healing:
    """Kill the only holder of the last blocks under clients that generate."""
    with swarm() as processes:
        for start in (0, 4):
            processes.start(f"pinned-{start}", "--blocks", f"{start}:{start + 4}")
        victim, spare = (processes.start(name, "--blocks", "8:12") for name in ("victim", "spare"))
        movable = [processes.start(f"free-{index}", "--num-blocks", "4") for index in range(2)]
        processes.stop(spare)  # since then, the victim holds its blocks alone
        model = [
            AutoDistributedModelForCausalLM.from_pretrained(
                MODEL, initial_peers=[processes.address], dtype=torch.float32
            )
            for _ in script
        ]
        clients = [ReadingClient(each, *dialogue) for each, dialogue in zip(model, script, strict=True)]
        for client in clients:
            client.start()
        while any(client.num_tokens < TOKENS_BEFORE and client.is_running for client in clients):
            time.sleep(0.01)
        victim.kill()
        killed_at = time.perf_counter()
        peer = victim.facts["peer"]
        while missing([each for each in processes.servers() if each.peer != peer]):
            time.sleep(0.2)
            if not any(client.is_running for client in clients):
                break
        healed = time.perf_counter() - killed_at
        for client in clients:
            client.join()
        for each in model:
            each.close()
        logs = {child.name: child.log.read_text() for child in movable}
        movers = [name for name, log in logs.items() if re.search(r"goes from blocks .* had no server", log)]
        loading = [float(seconds) for name in movers for seconds in re.findall(r"took ([\d.]+) s", logs[name])]
        faults = [fault for client in clients if (fault := client.fault) is not None]
        if len(movers) != 1:
            faults.append(f"{len(movers)} servers moved to the blocks")
        gaps = tuple(client.gap for client in clients if client.generation is not None)
        return Healing(", ".join(movers), healed, max(loading, default=0.0), gaps, tuple(faults))


def measure_healing(runs: int) -> bool:
    """Print a table of `runs` kills. Returns whether all were healed in time."""
    script = dialogues(3)
    print(f"\nthe only holder of blocks 8:12 is killed under {len(script)} clients, {NUM_TOKENS} tokens each")
    print("run  mover     in the directory  loading  longest gap of each client        verdict")
    good = True
    for run in range(1, runs + 1):
        found = heal(script)
        gaps = "  ".join(f"{gap:5.2f} s" for gap in found.gaps)
        verdict = "same tokens, in time" if found.is_good else "; ".join(found.faults) or "too late"
        good &= found.is_good
        print(
            f"{run:3}  {found.mover or 'none':8}  {found.healed:12.2f} s  {found.loading:5.1f} s  {gaps:32}  {verdict}",
            flush=True,
        )
    return good


# -- a start -----------------------------------------------------------------------------------------------------------


def measure_starts(starts: int, num_servers: int) -> bool:
    """Print a table of `starts` starts of servers at the same moment. Returns whether none left a hole."""
    most = -(-NUM_BLOCKS // num_servers)
    print(f"\n{num_servers} servers start at the same moment, with at most {most} of {NUM_BLOCKS} blocks each")
    print("start  spans                                 seconds  missing")
    holes = 0
    for start in range(1, starts + 1):
        with swarm() as processes:
            began = time.perf_counter()
            children = [processes.begin(f"s{index}", "--num-blocks", str(most)) for index in range(num_servers)]
            processes.wait(*children)
            seconds = time.perf_counter() - began
            servers = [each for each in processes.servers() if each.state is ServerState.ONLINE]
            left = missing(servers)
            holes += bool(left)
            spans = " ".join(str(span) for span in sorted(server.span for server in servers))
            print(f"{start:5}  {spans:36}  {seconds:6.1f}  {left or 'none'}", flush=True)
    print(f"starts without a hole: {starts - holes} of {starts}")
    return not holes


@interruptible()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--starts", type=int, default=0)
    parser.add_argument("--servers", type=int, default=4)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("SHOAL_CACHE", cache)
        good = [
            measure_healing(arguments.runs) if arguments.runs else True,
            measure_starts(arguments.starts, arguments.servers) if arguments.starts else True,
        ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
