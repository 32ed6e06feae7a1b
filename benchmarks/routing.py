"""NSGA-II against the shortest path as ways to choose routes, in simulated swarms on two continents.

    python -m benchmarks.routing [--servers 10 100 1000] [--clients 64] [--seeds 3] [--json]

The table has for each chooser: the true step time of a client that is alone, and its ratio to that of a client that
knows every link; the tokens per second of many clients that choose at the same time, from the same view; the same
for clients that arrive in eight waves and see the queues of the waves before; the 95th percentiles of their step times;
and the CPU time of a choice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from benchmarks.machine import describe_machine
from benchmarks.simulated import Place, Simulated, Traffic
from shoal.peers import short
from shoal.policy.routing.route import Chooser, Hop, Measured, Needs, choose_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

WAVES = 8
SECONDS = 20.0
NUM_BLOCKS = {10: 16, 100: 32, 1000: 80}
Choose = Callable[[SwarmView, Measured, int], tuple[Hop, ...]]


def by(chooser: Chooser) -> Choose:
    def choose(view: SwarmView, known: Measured, seed: int) -> tuple[Hop, ...]:
        span = Span(0, view.num_blocks)
        return choose_route(view, span, needs=Needs(), known=known, chooser=chooser, rng=random.Random(seed)).hops

    return choose


def by_chance(view: SwarmView, known: Measured, seed: int) -> tuple[Hop, ...]:
    """A random route: any server that holds the next block, up to its last block."""
    chance, hops, block = random.Random(seed), list[Hop](), 0
    while block < view.num_blocks:
        server = chance.choice([server for server in view.servers if block in server.span])
        hops.append(Hop(server, Span(block, server.span.end)))
        block = server.span.end
    return tuple(hops)


CHOOSERS: dict[str, Choose] = {"shortest": by("shortest"), "nsga2": by("nsga2"), "chance": by_chance}


def with_all_links(swarm: Simulated) -> SwarmView:
    """The view of the same swarm in which every link is announced."""
    view, places = swarm.view, swarm.places
    links = {
        one: tuple((short(other), places[one].round_trip(places[other])) for other in places if other != one)
        for one in places
    }
    return replace(view, servers=tuple(replace(server, round_trips=links[server.peer]) for server in view.servers))


def shuffled(view: SwarmView, seed: int) -> SwarmView:
    """The view with its servers in another order, as each client has its own."""
    servers = list(view.servers)
    random.Random(seed).shuffle(servers)
    return replace(view, servers=tuple(servers))


def alone(swarm: Simulated, choose: Choose, clients: list[Place]) -> tuple[float, float]:
    """The step of a client that is alone, and the CPU time of its choice; medians, in seconds."""
    steps, seconds = [], []
    for index, place in enumerate(clients):
        view, known = shuffled(swarm.view, index), swarm.measured_from(place)
        began = time.thread_time()
        hops = choose(view, known, index)
        seconds.append(time.thread_time() - began)
        steps.append(swarm.step_seconds(hops, place))
    return statistics.median(steps), statistics.median(seconds)


def together(swarm: Simulated, choose: Choose, clients: list[Place], *, waves: int) -> tuple[float, float]:
    """Tokens per second of all clients, and the 95th percentile of their steps, in seconds."""
    traffic, queues = Traffic(swarm), Counter[str]()
    for wave in range(waves):
        servers = (replace(server, queue_length=queues[server.peer]) for server in swarm.view.servers)
        view = replace(swarm.view, servers=tuple(servers))
        for index in range(wave, len(clients), waves):
            hops = choose(shuffled(view, index), swarm.measured_from(clients[index]), index)
            traffic.clients.append((clients[index], hops))
        speed, steps, queues = traffic.run(SECONDS)
    return speed, statistics.quantiles(steps, n=20)[-1]


def measure(num_servers: int, num_clients: int, num_seeds: int) -> list[dict[str, object]]:
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in CHOOSERS}
    for seed in range(num_seeds):
        swarm = Simulated.of(num_servers, NUM_BLOCKS.get(num_servers, 32), seed=seed)
        chance = random.Random(1000 + seed)
        clients = [Place.anywhere(chance) for _ in range(num_clients)]
        best, _ = alone(replace(swarm, view=with_all_links(swarm)), CHOOSERS["shortest"], clients[:8])
        for name, choose in CHOOSERS.items():
            step, seconds = alone(swarm, choose, clients[:8])
            at_once = together(swarm, choose, clients, waves=1)
            in_waves = together(swarm, choose, clients, waves=WAVES)
            found[name].append((step, step / best, *at_once, *in_waves, seconds))
            print(f"{num_servers} servers, seed {seed}, {name}", file=sys.stderr)
    titles = ("step", "of_best", "at_once", "at_once_p95", "in_waves", "in_waves_p95", "seconds_to_choose")
    return [
        {"servers": num_servers, "chooser": name}
        | {title: statistics.mean(values) for title, values in zip(titles, zip(*rows, strict=True), strict=True)}
        for name, rows in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[2]
    rows = [row for number in arguments.servers for row in measure(number, arguments.clients, arguments.seeds)]
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "load_before": load, "choosers": rows}, indent=2))
        return
    print(f"{describe_machine()}; load before: {load:.1f}\n")
    print(
        "| servers | chooser | step, ms | ratio to the best | at once, tokens/s | 95 %, ms "
        "| in waves, tokens/s | 95 %, ms | to choose, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        step, of_best, at_once, at_once_p95, in_waves, in_waves_p95, seconds = list(row.values())[2:]
        print(
            f"| {row['servers']} | {row['chooser']} | {step * 1e3:.0f} | {of_best:.2f} | {at_once:.0f} |"
            f" {at_once_p95 * 1e3:.0f} | {in_waves:.0f} | {in_waves_p95 * 1e3:.0f} | {seconds * 1e3:.1f} |"
        )


if __name__ == "__main__":
    main()
