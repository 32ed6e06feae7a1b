"""What fourteen server processes behind shaped links do, for `python -m shoal.simulator calibrate`.

    python -m benchmarks.calibration --out measured.json [--rounds 3] [--answer 48]
    python -m shoal.simulator calibrate --measured measured.json

The servers hold blocks of the bundled model in float32; each has a link of its own. The twin is told what the live
swarm knows: the speeds that servers announce, and the round trips that clients and servers have measured. What else a
token takes was measured without links, one client at a time, so that the twin has to predict what links and more
clients change. The figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import torch
import transformers

from benchmarks.clients import announced, at_the_same_time, decoding_speed, generate
from benchmarks.machine import describe_machine
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.peers import short
from shoal.testing import Link, ShapedSwarm, shaped_swarm

SPANS = ("0:4", "4:8", "8:12", "0:3", "3:6", "6:9", "9:12", "0:5", "5:10", "10:12", "0:6", "6:12", "0:7", "7:12")
ROUTES = ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9), (10, 11), (12, 13))
"""The servers of each route. A client is pinned to one: whether clients choose alike is not what is measured here."""
PROMPT = 16
SETTLE_SECONDS = 40.0
"""By then, servers have measured the round trips to each other and announced them."""
QUIET_SECONDS = 10.0


def links(seed: int) -> list[Link]:
    """A link for each server: 5 to 40 ms one way, 50 to 200 Mbit/s."""
    rng = random.Random(seed)
    return [Link(delay_seconds=rng.uniform(0.005, 0.04), bytes_per_second=rng.uniform(50e6, 200e6) / 8) for _ in SPANS]


def described(models: Sequence[Any], swarm: ShapedSwarm, links: Sequence[Link]) -> list[Any]:
    """The servers as the live swarm knows them: what they announce, and what these clients have measured."""
    infos = {info.peer: info for info in announced(models[0])}
    reach = {
        peer: seconds
        for model in models
        for peer, seconds in model.transformer.h.swarm.measurements.round_trips().items()
    }
    index_of = {short(server.peer): index for index, server in enumerate(swarm.servers)}
    return [
        {
            "span": server.span,
            "token_seconds": 1 / infos[server.peer].decode_speed,
            "row_seconds": 1 / infos[server.peer].prefill_speed,
            "delay_seconds": link.delay_seconds,
            "bytes_per_second": link.bytes_per_second,
            "round_trip": reach.get(server.peer),
            "round_trips": [(index_of[name], seconds) for name, seconds in infos[server.peer].round_trips],
        }
        for server, link in zip(swarm.servers, links, strict=True)
    ]


@contextlib.contextmanager
def opened(links: Sequence[Link]) -> Iterator[tuple[ShapedSwarm, list[Any]]]:
    """A swarm behind these links, and a client for each route that has not measured anything yet."""
    with contextlib.ExitStack() as stack:
        swarm = stack.enter_context(shaped_swarm(STORIES, SPANS, link=links, options=["--dtype", "float32"]))
        models = []
        for route in ROUTES:
            pinned = {swarm.servers[index].span: swarm.servers[index].peer for index in route}
            model = AutoDistributedModelForCausalLM.from_pretrained(
                STORIES, initial_peers=swarm.addresses, dtype=torch.float32, pinned=pinned
            )
            stack.callback(model.close)
            models.append(model)
        yield swarm, models


@dataclass(frozen=True)
class Spent:
    """Processor seconds of the servers with their daemons and proxies, and of the clients with theirs, up to a time."""

    servers: float
    client: float
    at: float

    @classmethod
    def now(cls, swarm: ShapedSwarm) -> Self:
        """Since the processes began."""
        of_servers = [swarm.proxies.pid]
        for server in swarm.servers:
            process = psutil.Process(server.process.pid)
            of_servers += [process.pid, *(child.pid for child in process.children(recursive=True))]
        own = psutil.Process()
        everybody = {each.pid: _seconds(each) for each in (own, *own.children(recursive=True))}
        servers = sum(everybody.get(pid, 0.0) for pid in of_servers)
        return cls(servers, sum(everybody.values()) - servers, time.monotonic())

    def since(self, before: Spent) -> Spent:
        """What was spent in between."""
        return Spent(self.servers - before.servers, self.client - before.client, self.at - before.at)

    def beyond(self, quiet: Spent) -> Spent:
        """What was spent in addition to what is spent in the same time without clients."""
        times = self.at / quiet.at
        return Spent(self.servers - times * quiet.servers, self.client - times * quiet.client, self.at)


def settled(swarm: ShapedSwarm) -> Spent:
    """Wait until servers have measured the round trips to each other. Returns what is spent without clients."""
    time.sleep(SETTLE_SECONDS)
    before = Spent.now(swarm)
    time.sleep(QUIET_SECONDS)
    return Spent.now(swarm).since(before)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run(models: Sequence[Any], routes: Sequence[int], answer: int, rounds: int) -> dict[str, Any]:
    """Clients on these routes decode at the same time. Medians over rounds; the first round warms up."""
    speeds, seconds = [], []
    for number in range(rounds + 1):
        chance = torch.Generator().manual_seed(number)
        prompts = torch.randint(3, models[0].config.vocab_size, (len(routes), PROMPT), generator=chance).split(1)
        clients = [
            partial(generate, models[route], prompt, answer) for route, prompt in zip(routes, prompts, strict=True)
        ]
        found = at_the_same_time(clients)
        if number:
            speeds.append(decoding_speed(found))
            seconds.append(statistics.mean(statistics.median(gap for _, gap in each.gaps()) for each in found))
            print(f"routes {routes}, round {number}: {speeds[-1]:.4g} tokens/s", file=sys.stderr)
    return {
        "routes": list(routes),
        "prompt": PROMPT,
        "answer": answer,
        "tokens_per_second": statistics.median(speeds),
        "token_seconds": statistics.median(seconds),
    }


def measure(answer: int, rounds: int, seed: int) -> dict[str, Any]:
    """Everything that the twin is made of, and what it is compared with."""
    without, with_links = [Link()] * len(SPANS), links(seed)
    each_alone = [(route,) for route in range(len(ROUTES))]
    with opened(without) as (swarm, models):
        quiet = settled(swarm)
        idle = described(models, swarm, without)
        before = Spent.now(swarm)
        unshaped = [run(models, routes, answer, rounds) for routes in each_alone]
        spent = Spent.now(swarm).since(before).beyond(quiet)
        row_bytes = models[0].config.hidden_size * 4
    with opened(with_links) as (swarm, models):
        settled(swarm)
        together = tuple(range(len(ROUTES)))
        runs = [run(models, routes, answer, rounds) for routes in each_alone]
        servers = described(models, swarm, with_links)  # before pings wait behind the work of many clients
        runs += [run(models, routes, answer, rounds) for routes in (together, together * 2)]
    for server, alone in zip(servers, idle, strict=True):
        server |= {name: alone[name] for name in ("token_seconds", "row_seconds")}
    num_tokens = len(each_alone) * (rounds + 1) * answer
    computing = statistics.mean(sum(idle[index]["token_seconds"] for index in route) for route in ROUTES)
    num_servers = statistics.mean(map(len, ROUTES))
    message_seconds, client_seconds = beyond_computing(idle, [each["token_seconds"] for each in unshaped])
    return {
        "machine": describe_machine(),
        "num_blocks": 12,
        "num_cores": len(os.sched_getaffinity(0)),
        "row_bytes": row_bytes,
        "client_seconds": client_seconds,
        "client_background": max(0.0, spent.client / num_tokens - client_seconds),
        "message_seconds": message_seconds,
        "message_background": max(0.0, (spent.servers / num_tokens - computing) / num_servers - message_seconds),
        "idle_round_trip": statistics.median(seconds for each in idle for _, seconds in each["round_trips"]),
        "servers": servers,
        "routes": ROUTES,
        "runs": runs,
        "unshaped": unshaped,
    }


def beyond_computing(servers: Sequence[Any], token_seconds: Sequence[float]) -> tuple[float, float]:
    """What a token takes on each route, without links, beyond what its servers announce: for each server, and once.

    The two numbers that fit all routes best.
    """
    rows = [[len(route), 1.0] for route in ROUTES]
    computing = [sum(servers[index]["token_seconds"] for index in route) for route in ROUTES]
    left = [seconds - own for seconds, own in zip(token_seconds, computing, strict=True)]
    per_server, once = np.linalg.lstsq(np.array(rows), np.array(left), rcond=None)[0].tolist()
    return max(0.0, per_server), max(0.0, once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = measure(arguments.answer, arguments.rounds, arguments.seed)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
