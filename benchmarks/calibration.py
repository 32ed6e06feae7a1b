"""What fourteen server processes behind shaped links do, for `python -m shoal.simulator calibrate`.

    python -m benchmarks.calibration --out measured.json [--delays 0.2 0.17 0.22 0.3 0.26] [--rounds 3] [--answer 48]
    python -m shoal.simulator calibrate --measured measured.json

The servers hold blocks of the bundled model in float32. What a token takes on each route is measured without links, one
client at a time. Then the servers get their links, and more clients come; at the end, the first part is measured again,
since the machine may have become slower. The twin is told the means of the first part and the links, and has to predict
what happened with links.

All servers of a route have the same link: a connection between two servers takes the link of the one that was dialled,
and that may be either. Of several rounds, the one counts that other programs disturbed least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.clients import announced, at_the_same_time, generate
from benchmarks.common.machine import describe_machine
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.host.processes import interruptible
from shoal.simulator.steps.twin import summed_speed
from shoal.testing import Link, ShapedSwarm, shaped_swarm

SPANS = ("0:4", "4:8", "8:12", "0:3", "3:6", "6:9", "9:12", "0:5", "5:10", "10:12", "0:6", "6:12", "0:7", "7:12")
ROUTES = ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9), (10, 11), (12, 13))
"""The servers of each route. A client is pinned to one: whether clients choose alike is not what is measured here."""
DELAYS = (0.2, 0.17, 0.22, 0.3, 0.26)
"""The seconds one way of the links of each route's servers. All servers and clients compute on one machine, so links
have to take much longer than what these processes take from each other."""
NUM_BLOCKS = 12
BYTES_PER_SECOND = 100e6 / 8
PROMPT = 16


@contextlib.contextmanager
def opened() -> Iterator[tuple[ShapedSwarm, list[Any]]]:
    """A swarm whose links do nothing yet, and a client for each route."""
    with contextlib.ExitStack() as stack:
        swarm = stack.enter_context(shaped_swarm(STORIES, SPANS, options=["--dtype", "float32"], preloaded=True))
        models = []
        for route in ROUTES:
            pinned = {swarm.servers[index].span: swarm.servers[index].peer for index in route}
            model = AutoDistributedModelForCausalLM.from_pretrained(
                STORIES, initial_peers=swarm.addresses, dtype=torch.float32, pinned=pinned
            )
            stack.callback(model.close)
            models.append(model)
        yield swarm, models


def shape(swarm: ShapedSwarm, delays: Sequence[float]) -> list[Link]:
    """Give all servers of a route a link with the delay of this route. Returns the link of each server."""
    delay_of = {server: delay for route, delay in zip(ROUTES, delays, strict=True) for server in route}
    links = [Link(delay_seconds=delay_of[index], bytes_per_second=BYTES_PER_SECOND) for index in range(len(SPANS))]
    for server, link in zip(swarm.servers, links, strict=True):
        server.link(link)
    return links


def unshaped_seconds(models: Sequence[Any], answer: int, rounds: int) -> list[float]:
    """What a token takes on each route without links, for one client at a time."""
    return [run(models, [route], answer, rounds)["token_seconds"] for route in range(len(ROUTES))]


def described(models: Sequence[Any], swarm: ShapedSwarm, links: Sequence[Link], token_seconds: Sequence[float]) -> Any:
    """The servers as the twin knows them. What a token takes on a route is shared by its servers, by their blocks.

    Of that time, a part is messages and the client; with these links, it does not matter much where it is spent.
    """
    infos = {info.peer: info for info in announced(models[0])}
    found = []
    for index, (server, link) in enumerate(zip(swarm.servers, links, strict=True)):
        info = infos[server.peer]
        whole = next(seconds for seconds, route in zip(token_seconds, ROUTES, strict=True) if index in route)
        seconds = whole * len(info.span) / NUM_BLOCKS
        found.append(
            {
                "span": server.span,
                "token_seconds": seconds,
                "row_seconds": seconds * min(1.0, (info.decode_speed or 1.0) / (info.prefill_speed or 1.0)),
                "delay_seconds": link.delay_seconds,
                "bytes_per_second": link.bytes_per_second,
            }
        )
    return found


def run(models: Sequence[Any], routes: Sequence[int], answer: int, rounds: int) -> dict[str, Any]:
    """Clients on these routes decode at the same time: the round that was disturbed least."""
    found_of: list[tuple[float, float]] = []
    for number in range(rounds):
        chance = torch.Generator().manual_seed(number)
        prompts = torch.randint(3, models[0].config.vocab_size, (len(routes), PROMPT), generator=chance).split(1)
        clients = [
            partial(generate, models[route], prompt, answer) for route, prompt in zip(routes, prompts, strict=True)
        ]
        found = at_the_same_time(clients)
        seconds = statistics.mean(statistics.median(gap for _, gap in each.gaps()) for each in found)
        found_of.append((seconds, summed_speed([each.times for each in found])))
        print(f"routes {routes}, round {number}: {1000 * seconds:.4g} ms a token", file=sys.stderr)
    token_seconds, tokens_per_second = min(found_of)
    return {
        "routes": list(routes),
        "prompt": PROMPT,
        "answer": answer,
        "tokens_per_second": tokens_per_second,
        "token_seconds": token_seconds,
    }


def measure(
    swarm: ShapedSwarm,
    models: Sequence[Any],
    loads: Sequence[Sequence[int]],
    *,
    delays: Sequence[float] = DELAYS,
    answer: int,
    rounds: int,
) -> dict[str, Any]:
    """Everything that the twin is made of, and what it is compared with: clients on the routes of each load."""
    unshaped_seconds(models, 4, 1)  # opens connections, and brings the code into memory
    before = unshaped_seconds(models, answer, rounds)
    links = shape(swarm, delays)
    runs = [run(models, routes, answer, rounds) for routes in loads]
    for server in swarm.servers:
        server.link(Link())
    after = unshaped_seconds(models, answer, rounds)
    token_seconds = [statistics.mean(both) for both in zip(before, after, strict=True)]
    return {
        "machine": describe_machine(),
        "num_blocks": NUM_BLOCKS,
        "num_cores": len(os.sched_getaffinity(0)),
        "row_bytes": models[0].config.hidden_size * 4,
        "servers": described(models, swarm, links, token_seconds),
        "routes": ROUTES,
        "runs": runs,
        "unshaped_token_seconds": {"before": before, "after": after},
    }


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--delays", type=float, nargs=len(ROUTES), default=DELAYS, help="of each route, one way")
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    together = tuple(range(len(ROUTES)))
    loads = [*((route,) for route in together), together, together * 2]
    with opened() as (swarm, models):
        options = {"delays": arguments.delays, "answer": arguments.answer, "rounds": arguments.rounds}
        found = measure(swarm, models, loads, **options)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
