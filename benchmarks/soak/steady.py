"""Soak test of a small swarm: clients come, use it and are killed. Its memory and speed have to stay the same.

    python -m benchmarks.soak.steady [--seconds 300] [--clients 64] [--servers 2] [--cache-tokens 16384]

Each server is a process on loopback. The clients are threads of four processes, which are killed and replaced again and
again. So some sessions are closed, some are abandoned, and some end with their client. A separate client measures the
time of a token before and after. The exit status is 1 if a server's memory grows by more than `MAX_GROWTH` bytes from
the first third of the time to the end, if a token takes more than `MAX_SLOWDOWN` times as long as before, if the tokens
differ, or if pages of the cache are missing after all clients have ended.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import shoal
from benchmarks.common.clients import announced
from benchmarks.common.machine import describe_machine
from benchmarks.common.swarm import servers
from shoal import AutoDistributedModelForCausalLM
from shoal.cli.service.long_running import end_with_parent
from shoal.host.processes import interruptible

MODEL = Path(shoal.__file__).parent / "bundled" / "stories"
NUM_BLOCKS = 12
NUM_PROCESSES = 4
MAX_GROWTH = 64 << 20
MAX_SLOWDOWN = 1.5
IDLE_SECONDS = 60
"""The servers must announce an empty cache within this time after the last client."""


def open_model(address: str) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[address], dtype=torch.float32, salt="")


def a_prompt(chance: random.Random) -> torch.Tensor:
    """A random prompt. Half of the prompts begin with the same prefix."""
    common = list(range(10, 42)) if chance.random() < 0.5 else []
    return torch.tensor([common + [chance.randrange(3, 60) for _ in range(chance.randrange(1, 40))]])


def use(model: Any, chance: random.Random, abandoned: deque[Any]) -> None:
    """Open a session, generate in it, and close or abandon it."""
    session = model.inference_session(max_length=128)
    try:
        model.generate(a_prompt(chance), max_new_tokens=chance.randrange(1, 24), session=session)
        if chance.random() < 0.5:
            model.generate(None, max_new_tokens=chance.randrange(1, 16), session=session)
    except shoal.ShoalError as error:
        print(f"a client gave up: {error}", file=sys.stderr)
    if chance.random() < 0.7:
        session.close()
    else:
        abandoned.append(session)


def work(address: str, num_clients: int) -> None:
    """Run clients until the process is killed, or its parent has ended."""
    end_with_parent()
    model = open_model(address)

    def use_forever(seed: int) -> None:
        chance = random.Random(f"{seed} {time.time()}")
        abandoned = deque[Any](maxlen=2)
        while True:
            use(model, chance, abandoned)

    for seed in range(num_clients):
        threading.Thread(target=use_forever, args=(seed,), daemon=True).start()
    threading.Event().wait()


def run_clients(address: str, num_clients: int, seconds: float) -> Iterator[float]:
    """Run the client processes, and replace one every 25 s. Yields the seconds that have passed, every 5 s."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.soak.steady",
        "--work",
        address,
        "--clients",
        str(num_clients // NUM_PROCESSES),
    ]

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE)  # ends with this process

    processes = [begin() for _ in range(NUM_PROCESSES)]
    start = time.monotonic()
    try:
        for turn in itertools.count():
            time.sleep(5)
            if (passed := time.monotonic() - start) > seconds:
                return
            yield passed
            if turn % 5 == 4:
                oldest = processes.pop(0)
                oldest.kill()
                oldest.wait()
                processes.append(begin())
    finally:
        for process in processes:
            process.kill()
            process.wait()


def probe(model: Any) -> tuple[float, list[int]]:
    """The median time of a token without other clients, in ms, and the tokens."""
    prompt, seconds = torch.tensor([list(range(5, 25))]), []
    for _ in range(7):
        start = time.perf_counter()
        output = model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        seconds.append((time.perf_counter() - start) / 32)
    return 1000 * statistics.median(seconds), output[0].tolist()


def server_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "serve" in child.cmdline()]


def tokens_left(model: Any) -> list[int]:
    """The free cache tokens that each server announces."""
    return [server.cache_tokens_left for server in announced(model)]


@interruptible()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--cache-tokens", type=int, default=16384)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.work:
        work(arguments.work, arguments.clients)

    print(describe_machine())
    bounds = [NUM_BLOCKS * index // arguments.servers for index in range(arguments.servers + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(bounds)]
    memory: list[tuple[float, int]] = []
    with servers(MODEL, spans, "--cache-tokens", str(arguments.cache_tokens), "--dtype", "float32") as address:
        model = open_model(address)
        probe(model)
        before, expected = probe(model)
        print(f"probe before: {before:.1f} ms a token\n  time   RSS MiB  threads  files  free cache tokens")
        for passed in run_clients(address, arguments.clients, arguments.seconds):
            processes = server_processes()
            memory.append((passed, max(process.memory_info().rss for process in processes)))
            print(
                f"{passed:5.0f}s  {memory[-1][1] / 2**20:8.1f}  {sum(each.num_threads() for each in processes):7}"
                f"  {sum(each.num_fds() for each in processes):5}  {tokens_left(model)}",
                flush=True,
            )
        deadline = time.monotonic() + IDLE_SECONDS
        while (left := tokens_left(model)) != [arguments.cache_tokens] * arguments.servers:
            if time.monotonic() > deadline:
                break
            time.sleep(1)
        after, found = probe(model)
        model.close()

    settled = max(rss for passed, rss in memory if passed <= max(arguments.seconds / 3, memory[0][0]))
    growth = memory[-1][1] - settled
    print(f"probe after: {after:.1f} ms a token; RSS grew by {growth / 2**20:.1f} MiB; free cache tokens: {left}")
    faults = {
        f"memory grew by more than {MAX_GROWTH >> 20} MiB": growth > MAX_GROWTH,
        f"a token takes more than {MAX_SLOWDOWN} times as long": after > MAX_SLOWDOWN * before,
        "the tokens differ": found != expected,
        "pages are missing": left != [arguments.cache_tokens] * arguments.servers,
    }
    for fault in (name for name, found_it in faults.items() if found_it):
        print(f"FAULT: {fault}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
