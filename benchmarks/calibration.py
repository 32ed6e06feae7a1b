"""What fourteen server processes behind shaped links do, for `python -m shoal.simulator calibrate`.

    python -m benchmarks.calibration --out measured.json [--clients 1 2 4] [--rounds 3] [--answer 48]
    python -m shoal.simulator calibrate --measured measured.json

The servers hold blocks of the bundled model in float32; each has a link of its own. The twin is told what the live
swarm knows: the speeds that servers announce, how much slower one client has found them without links, and the round
trips that clients and servers have measured. What else a token takes in a client was measured without links too, so
that the twin has to predict what links and more clients change. The figures are medians of the rounds.
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
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.clients import Generation, decoding_speed, generate_together
from benchmarks.machine import describe_machine
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.peers import short
from shoal.simulator.steps.twin import RealSwarm, predict
from shoal.testing import Link, ShapedSwarm, shaped_swarm

SPANS = ("0:4", "4:8", "8:12", "0:3", "3:6", "6:9", "9:12", "0:5", "5:10", "10:12", "0:6", "6:12", "2:7", "7:12")
HOP_SECONDS = 0.001
"""A message without a link, here: what is assumed. The rest of a step is counted as the client's."""
PROMPT = 16
SETTLE_SECONDS = 30.0
"""By then, servers have measured the round trips to each other and announced them."""


def links(seed: int) -> list[Link]:
    """A link for each server: 5 to 40 ms one way, 50 to 200 Mbit/s."""
    rng = random.Random(seed)
    return [Link(delay_seconds=rng.uniform(0.005, 0.04), bytes_per_second=rng.uniform(50e6, 200e6) / 8) for _ in SPANS]


def described(model: Any, swarm: ShapedSwarm, links: Sequence[Link], slowness: float) -> list[Any]:
    """The servers as the live swarm knows them: what they announce, and what this client has measured."""
    blocks = model.transformer.h
    infos = {info.peer: info for info in blocks.runtime.run(blocks.swarm._node.directory.servers(blocks.swarm.model))}
    reach = blocks.swarm.timings.round_trips()
    index_of = {short(server.peer): index for index, server in enumerate(swarm.servers)}
    return [
        {
            "span": server.span,
            "token_seconds": slowness / infos[server.peer].decode_speed,
            "row_seconds": slowness / infos[server.peer].prefill_speed,
            "delay_seconds": link.delay_seconds,
            "bytes_per_second": link.bytes_per_second,
            "round_trip": reach.get(server.peer),
            "round_trips": [(index_of[name], seconds) for name, seconds in infos[server.peer].round_trips],
        }
        for server, link in zip(swarm.servers, links, strict=True)
    ]


@contextlib.contextmanager
def opened(links: Sequence[Link]) -> Iterator[tuple[ShapedSwarm, Any]]:
    """A swarm behind these links, and a client that has not measured anything yet."""
    with shaped_swarm(STORIES, SPANS, link=links, options=["--dtype", "float32"]) as swarm:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            STORIES, initial_peers=swarm.addresses, dtype=torch.float32
        )
        try:
            yield swarm, model
        finally:
            model.close()


def usual_slowness(model: Any) -> float:
    """By what factor the servers that this client has used are slower than they announce: the median."""
    blocks = model.transformer.h

    async def measured() -> dict[str, float]:
        return dict(blocks.swarm.timings.measured().slowness)

    return statistics.median(blocks.runtime.run(measured()).values())


def run(model: Any, num_clients: int, answer: int, rounds: int) -> dict[str, float]:
    """Medians over rounds; the first round warms up."""
    speeds, seconds, firsts = [], [], []
    for index in range(rounds + 1):
        chance = torch.Generator().manual_seed(index)
        prompts = torch.randint(3, model.config.vocab_size, (num_clients, PROMPT), generator=chance).split(1)
        found = generate_together(model, prompts, answer)
        if index:
            speeds.append(decoding_speed(found))
            seconds.append(_token_seconds(found))
            firsts.append(statistics.median(each.seconds_to_first for each in found))
            print(f"{num_clients} clients, round {index}: {speeds[-1]:.4g} tokens/s", file=sys.stderr)
    return {
        "num_clients": num_clients,
        "prompt": PROMPT,
        "answer": answer,
        "tokens_per_second": statistics.median(speeds),
        "token_seconds": statistics.median(seconds),
        "first_token_seconds": statistics.median(firsts),
    }


def _token_seconds(found: Sequence[Generation]) -> float:
    return statistics.median(gap for each in found for _, gap in each.gaps())


def measure(clients: Sequence[int], answer: int, rounds: int, seed: int) -> dict[str, Any]:
    """Everything that the twin is made of, and what it is compared with."""
    without, with_links = [Link()] * len(SPANS), links(seed)
    with opened(without) as (swarm, model):
        unshaped = run(model, 1, answer, rounds)
        slowness = usual_slowness(model)
        unlinked = described(model, swarm, without, slowness)
        row_bytes = model.config.hidden_size * 4
    with opened(with_links) as (swarm, model):
        time.sleep(SETTLE_SECONDS)
        runs = [run(model, count, answer, rounds) for count in clients]
        servers = described(model, swarm, with_links, slowness)
    result = {
        "machine": describe_machine(),
        "num_blocks": 12,
        "num_cores": len(os.sched_getaffinity(0)),
        "row_bytes": row_bytes,
        "client_seconds": 0.0,
        "hop_seconds": HOP_SECONDS,
        "servers": unlinked,
        "runs": [unshaped],
    }
    without_client = RealSwarm.model_validate(result)
    own = unshaped["token_seconds"] - predict(without_client, without_client.runs[0]).token_seconds
    return result | {"client_seconds": max(0.0, own), "servers": servers, "runs": runs, "unshaped": unshaped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = measure(arguments.clients, arguments.answer, arguments.rounds, arguments.seed)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
