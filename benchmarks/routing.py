"""Ways to choose routes, compared in simulated swarms on two continents.

    python -m benchmarks.routing [--servers 10 100 1000] [--clients 64] [--seeds 3] [--json]
    python -m benchmarks.routing --saturated [--clients 400 1600 4800] [--waves 8] [--renewals 8] [--seeds 3] [--json]

The first table has for each chooser: the true step time of a client that is alone, and its ratio to that of a client
that knows every link; the tokens per second of many clients that choose at the same time, from the same view; the same
for clients that arrive in eight waves and see the queues of the waves before; the 95th percentiles of their step times;
and the CPU time of a choice, in a swarm where servers are busy.

The second has many clients on 40 servers, which placed their blocks by the shared plan, and what part they get of the
throughput that no placement can pass. Clients arrive in waves and see the queues at the end of the wave before. Then
the sessions of the first wave end, and these clients begin new ones, and so on for as many waves as there are
`--renewals`. The columns *mean factor* and *most factor* say how a client's route compares with the fastest one in the
view that it was chosen from.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.common.machine import describe_machine
from benchmarks.common.simulated import Simulated, Traffic
from shoal.host.processes import interruptible
from shoal.peers import short
from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.throughput import exact_throughput
from shoal.policy.routing.route import Chooser, Hop, Measured, Needs, choose_route, price_route
from shoal.policy.view import SwarmView
from shoal.simulator.world.places import Place
from shoal.spans import Span

WAVES = 8
WAVE_SECONDS = 6.0
SECONDS = 20.0
NUM_BLOCKS = {10: 16, 100: 32, 1000: 80}
SATURATED_SERVERS, SATURATED_BLOCKS = 40, 32
Choose = Callable[[SwarmView, Measured, int], tuple[Hop, ...]]


def by(chooser: Chooser) -> Choose:
    def choose(view: SwarmView, known: Measured, seed: int) -> tuple[Hop, ...]:
        span = Span(0, view.num_blocks)
        return choose_route(view, span, needs=Needs(), known=known, chooser=chooser, rng=random.Random(seed)).hops

    return choose


def by_chance(view: SwarmView, known: Measured, seed: int) -> tuple[Hop, ...]:
    """A random route: any server that holds the next block, up to its last block."""
    return _random_route(view, seed, lambda server: 1.0)


def by_speed(view: SwarmView, known: Measured, seed: int) -> tuple[Hop, ...]:
    """The same, with probabilities in proportion to the speed of a block on each server."""
    return _random_route(view, seed, lambda server: (server.decode_speed or 0.0) * len(server.span))


def _random_route(view: SwarmView, seed: int, weight: Callable[..., float]) -> tuple[Hop, ...]:
    chance, hops, block = random.Random(seed), list[Hop](), 0
    while block < view.num_blocks:
        holders = [server for server in view.servers if block in server.span]
        (server,) = chance.choices(holders, [weight(each) for each in holders])
        hops.append(Hop(server, Span(block, server.span.end)))
        block = server.span.end
    return tuple(hops)


CHOOSERS: dict[str, Choose] = {
    "shortest": by("shortest"),
    "balanced": by("balanced"),
    "nsga2": by("nsga2"),
    "chance": by_chance,
    "chance by speed": by_speed,
}


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


def with_queues(view: SwarmView, queues: Counter[str]) -> SwarmView:
    """The view in which servers announce these queues."""
    return replace(view, servers=tuple(replace(server, queue_length=queues[server.peer]) for server in view.servers))


def alone(swarm: Simulated, choose: Choose, clients: Sequence[Place]) -> float:
    """The step of a client that is alone: the median, in seconds."""
    steps = []
    for index, place in enumerate(clients):
        hops = choose(shuffled(swarm.view, index), swarm.measured_from(place), index)
        steps.append(swarm.step_seconds(hops, place))
    return statistics.median(steps)


def seconds_to_choose(swarm: Simulated, choose: Choose, clients: Sequence[Place], queues: Counter[str]) -> float:
    """The CPU time of a choice where the servers have queues: the median, in seconds."""
    seconds = []
    for index, place in enumerate(clients):
        view, known = shuffled(with_queues(swarm.view, queues), index), swarm.measured_from(place)
        began = time.thread_time()
        choose(view, known, index)
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Together:
    """Many clients: tokens per second of all, the 95th percentile of their steps in seconds, the servers of a route,
    and how much longer than the fastest route theirs were expected to take, on average and at most."""

    speed: float
    p95: float
    hops: float
    mean_factor: float
    most_factor: float


@dataclass(frozen=True)
class Pace:
    """How clients come: in `waves`, and after these in `renewals` that begin new sessions. All of them see the queues
    of the wave before, which lasts `wave_seconds`; the last one is measured for `seconds`."""

    waves: int
    renewals: int = 0
    wave_seconds: float = WAVE_SECONDS
    seconds: float = SECONDS


def together(swarm: Simulated, choose: Choose, clients: Sequence[Place], pace: Pace) -> Together:
    routes: dict[int, tuple[Hop, ...]] = {}
    queues, factors = Counter[str](), list[float]()
    speed, steps = 0.0, [0.0, 0.0]
    for wave in range(pace.waves + pace.renewals):
        view = with_queues(swarm.view, queues)
        for index in range(wave % pace.waves, len(clients), pace.waves):
            seed = wave // pace.waves * len(clients) + index
            seen, known = shuffled(view, seed), swarm.measured_from(clients[index])
            routes[index] = hops = choose(seen, known, seed)
            if index // pace.waves % 8 == 0:
                fastest = choose_route(seen, Span(0, seen.num_blocks), needs=Needs(), known=known).seconds
                factors.append(price_route(hops, needs=Needs(), known=known).seconds / fastest)
        is_last = wave == pace.waves + pace.renewals - 1
        traffic = Traffic(swarm, [(clients[index], hops) for index, hops in routes.items()])
        speed, steps, queues = traffic.run(pace.seconds if is_last else pace.wave_seconds)
    lengths = statistics.mean(len(hops) for hops in routes.values())
    p95 = statistics.quantiles(steps, n=20)[-1] if len(steps) > 1 else float("nan")
    return Together(speed, p95, lengths, statistics.mean(factors), max(factors))


def measure(num_servers: int, num_clients: int, num_seeds: int, names: Sequence[str]) -> list[dict[str, object]]:
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for seed in range(num_seeds):
        swarm = Simulated.of(num_servers, NUM_BLOCKS.get(num_servers, 32), seed=seed)
        chance = random.Random(1000 + seed)
        clients = [Place.anywhere(chance) for _ in range(num_clients)]
        queues = Counter({server.peer: chance.randint(0, 6) for server in swarm.view.servers})
        best = alone(replace(swarm, view=with_all_links(swarm)), CHOOSERS["shortest"], clients[:8])
        for name in names:
            choose = CHOOSERS[name]
            step = alone(swarm, choose, clients[:8])
            at_once = together(swarm, choose, clients, Pace(1))
            in_waves = together(swarm, choose, clients, Pace(WAVES))
            seconds = seconds_to_choose(swarm, choose, clients[:8], queues)
            found[name].append((step, step / best, at_once.speed, at_once.p95, in_waves.speed, in_waves.p95, seconds))
            print(f"{num_servers} servers, seed {seed}, {name}", file=sys.stderr)
    titles = ("step", "of_best", "at_once", "at_once_p95", "in_waves", "in_waves_p95", "seconds_to_choose")
    return [{"servers": num_servers, "chooser": name} | _means(titles, rows) for name, rows in found.items()]


def saturate(num_clients: int, num_seeds: int, names: Sequence[str], pace: Pace) -> list[dict[str, object]]:
    """Many clients on 40 servers, and their part of what the machines allow."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for seed in range(num_seeds):
        swarm = Simulated.of(SATURATED_SERVERS, SATURATED_BLOCKS, seed=seed, rule="graded")
        bound = throughput_bound(swarm.machines, SATURATED_BLOCKS)
        exact = exact_throughput(swarm.machines, SATURATED_BLOCKS)
        chance = random.Random(2000 + seed)
        clients = [Place.anywhere(chance) for _ in range(num_clients)]
        for name in names:
            step = alone(swarm, CHOOSERS[name], clients[:8])
            many = together(swarm, CHOOSERS[name], clients, pace)
            row = (step, bound, exact / bound, many.speed, many.speed / bound, many.p95, many.hops)
            found[name].append((*row, many.mean_factor, many.most_factor))
            print(f"{num_clients} clients, seed {seed}, {name}: {many.speed / bound:.2f}", file=sys.stderr)
    titles = ("step", "bound", "exact_of_bound", "tokens", "of_bound", "p95", "hops", "mean_factor", "most_factor")
    return [{"clients": num_clients, "chooser": name} | _means(titles, rows) for name, rows in found.items()]


def _means(titles: Sequence[str], rows: Sequence[tuple[float, ...]]) -> dict[str, object]:
    return {title: statistics.mean(values) for title, values in zip(titles, zip(*rows, strict=True), strict=True)}


COLUMNS = {
    "servers": "{}", "clients": "{}", "chooser": "{}", "step": "{:.3f}", "of_best": "{:.2f}", "at_once": "{:.0f}",
    "at_once_p95": "{:.3f}", "in_waves": "{:.0f}", "in_waves_p95": "{:.3f}", "seconds_to_choose": "{:.4f}",
    "bound": "{:.0f}", "exact_of_bound": "{:.2f}", "tokens": "{:.0f}", "of_bound": "{:.2f}", "p95": "{:.2f}",
    "hops": "{:.1f}", "mean_factor": "{:.2f}", "most_factor": "{:.2f}",
}  # fmt: skip


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--saturated", action="store_true")
    parser.add_argument("--waves", type=int, default=WAVES, help="of clients that saturate the swarm")
    parser.add_argument("--renewals", type=int, default=WAVES, help="waves of clients that begin another session")
    parser.add_argument("--wave-seconds", type=float, default=WAVE_SECONDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that count, after the last wave")
    parser.add_argument("--choosers", nargs="+", default=list(CHOOSERS), choices=list(CHOOSERS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[2]
    if arguments.saturated:
        numbers = arguments.clients or [400, 1600, 4800]
        pace = Pace(arguments.waves, arguments.renewals, arguments.wave_seconds, arguments.seconds)
        rows = [row for number in numbers for row in saturate(number, arguments.seeds, arguments.choosers, pace)]
    else:
        (number,) = arguments.clients or [64]
        of_size = (measure(servers, number, arguments.seeds, arguments.choosers) for servers in arguments.servers)
        rows = [row for each in of_size for row in each]
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "load_before": load, "choosers": rows}, indent=2))
        return
    print(f"{describe_machine()}; load before: {load:.1f}; times in seconds, speeds in tokens/s\n")
    titles = list(rows[0])
    print(f"| {' | '.join(title.replace('_', ' ') for title in titles)} |")
    print("|---" * len(titles) + "|")
    for row in rows:
        print(f"| {' | '.join(COLUMNS[title].format(row[title]) for title in titles)} |")


if __name__ == "__main__":
    main()
