"""Placement while machines come and go: joining and moving rules side by side.

    python -m benchmarks.placement_churn [--traces FOLDER] [--hours 8] [--seeds 2] [--only NAME ...] [--rules plan ...]

Machines decide by `shoal.policy.placement` in virtual time, from views that are up to 20 s old; they notice a machine
that vanished after some seconds. Loading takes 60 s. The table has, averaged over time, the shares of the bound
of what the online servers carry (exact: they share their time freely; min: each divides it evenly), the share of time
with a block that no server holds, moves per departure, and the median time until such a hole is healed. Times at which
the machines together could not hold all blocks do not count.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.placement_swarms import LOAD_SECONDS, Stay, scoring_of, trace_churn, weibull_churn
from shoal.policy.placement.bound import throughput_bound
from shoal.policy.placement.joining import Rule
from shoal.policy.placement.lifetime import Lifetimes, Lives
from shoal.policy.placement.machines import Machine
from shoal.policy.placement.mover import Arrival, Mover
from shoal.policy.placement.petals import choose_move
from shoal.policy.placement.plan import Move, plan_moves
from shoal.policy.placement.score import Scoring
from shoal.policy.placement.throughput import block_throughputs, exact_throughput
from shoal.spans import Span

VIEW_SECONDS = 20.0
PHASES = 4
"""The number of moments of each period at which views are read."""
NOTICED = (2.0, 8.0)
"""Seconds until all notice that a machine vanished."""
PETALS_EVERY = 120.0
NUM_BLOCKS = 80


@dataclass(frozen=True)
class Rules:
    """How machines join and move."""

    name: str
    join: Rule
    move: str  # "no", "petals", "plan"
    lifetimes: bool = False


RULES = {
    rules.name: rules
    for rules in (
        Rules("none", "petals", "no"),
        Rules("petals", "petals", "petals"),
        Rules("graded", "graded", "no"),
        Rules("plan", "graded", "plan"),
        Rules("plan+life", "graded", "plan", lifetimes=True),
    )
}


@dataclass
class Result:
    """Averages over time."""

    exact: float = 0.0
    least: float = 0.0
    holes: float = 0.0
    moves: int = 0
    departures: int = 0
    counted: float = 0.0
    impossible: float = 0.0
    healed: list[float] = field(default_factory=list)

    def add(self, seconds: float, exact: float, least: float) -> None:
        self.counted += seconds
        self.exact += seconds * exact
        self.least += seconds * least
        self.holes += seconds * (least == 0)


@dataclass
class Server:
    """A machine that is up: what it serves, what it claims, and its state machines."""

    machine: Machine
    down: float
    phase: int
    span: Span | None = None  # online
    loading: Span | None = None
    ready_at: float = 0.0
    arrival: Arrival | None = None
    mover: Mover | None = None

    def records(self) -> list[Machine]:
        found = []
        if self.span is not None:
            found.append(replace(self.machine, span=self.span))
        claim = self.loading
        if claim is None and self.mover is not None:
            claim = self.mover.claim
        if claim is None and self.arrival is not None and self.arrival.placed is not None:
            claim = self.arrival.placed.span
        if claim is not None and claim != self.span:
            found.append(replace(self.machine, span=claim, ready_at=max(self.ready_at, 1e-3), movable=False))
        return found


class Churn:
    """One run. Events are (time, order, action)."""

    def __init__(
        self,
        stays: Sequence[Stay],
        rules: Rules,
        *,
        hours: float,
        seed: int,
        num_blocks: int,
        scoring: Scoring,
        warm: float,
    ) -> None:
        self.rules, self.seconds, self.num_blocks, self.scoring, self.warm = (
            rules,
            hours * 3600,
            num_blocks,
            scoring,
            warm,
        )
        self.rng = random.Random(seed)
        self.now = -warm
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.servers: dict[str, Server] = {}
        self.ghosts: dict[str, list[Machine]] = {}
        self.snapshots: list[tuple[Machine, ...]] = [()] * PHASES
        self.lives = Lives()
        self.plans: dict[object, tuple[Move, ...]] = {}
        self.values: dict[object, tuple[float, float]] = {}
        self.bounds: dict[object, float] = {}
        self.result = Result()
        self.hole_since: float | None = None
        self.plan_seconds: list[float] = []
        for stay in stays:
            if stay.down > -warm and stay.up < self.seconds:
                self.at(max(stay.up, -warm), lambda stay=stay: self.join(stay))
        for phase in range(PHASES):
            self.at(-warm + phase * VIEW_SECONDS / PHASES, lambda phase=phase: self.refresh(phase))

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), action))

    def run(self) -> Result:
        while self.events and self.events[0][0] < self.seconds:
            when, _, action = heapq.heappop(self.events)
            self.account(when)
            self.now = when
            action()
        self.account(self.seconds)
        return self.result

    def account(self, until: float) -> None:
        seconds = until - max(self.now, 0.0)
        if seconds <= 0:
            return
        machines = [server.machine for server in self.servers.values()]
        if sum(machine.max_blocks for machine in machines) < self.num_blocks:
            self.result.impossible += seconds
            self.hole_since = None
            return
        key = frozenset(machine.peer for machine in machines)
        if key not in self.bounds:
            self.bounds[key] = throughput_bound(machines, self.num_blocks)
        online = [replace(s.machine, span=s.span) for s in self.servers.values() if s.span is not None]
        place = frozenset((machine.peer, machine.span) for machine in online)
        if place not in self.values:
            least = min(block_throughputs(online, self.num_blocks))
            self.values[place] = (exact_throughput(online, self.num_blocks), least)
        exact, least = self.values[place]
        self.result.add(seconds, exact / self.bounds[key], least / self.bounds[key])
        if least == 0 and self.hole_since is None:
            self.hole_since = max(self.now, 0.0)
        elif least > 0 and self.hole_since is not None:
            self.result.healed.append(max(self.now, 0.0) - self.hole_since)
            self.hole_since = None

    def join(self, stay: Stay) -> None:
        machine = replace(stay.machine, up_since=stay.up)
        server = Server(machine, stay.down, self.rng.randrange(PHASES))
        server.arrival = Arrival(machine, self.num_blocks, rule=self.rules.join)
        self.servers[machine.peer] = server
        self.at(max(stay.down, self.now), lambda: self.leave(machine.peer))
        self.lives = self.lives.joined(machine.peer, machine.zone, stay.up)
        self.arrive(machine.peer)

    def arrive(self, peer: str) -> None:
        server = self.servers.get(peer)
        if server is None or server.arrival is None:
            return
        server.arrival = server.arrival.after_view(self.fresh(), now=self.now, rng=self.rng)
        if server.arrival.settled and server.arrival.placed is not None:
            self.load(server, server.arrival.placed.span)
            server.arrival = None
        else:
            self.at(server.arrival.next_look_at, lambda: self.arrive(peer))

    def load(self, server: Server, span: Span) -> None:
        server.span, server.loading = None, span
        server.ready_at = self.now + LOAD_SECONDS
        self.at(server.ready_at, lambda: self.loaded(server))

    def loaded(self, server: Server) -> None:
        if self.servers.get(server.machine.peer) is not server:
            return
        server.span, server.loading, server.ready_at = server.loading, None, 0.0
        if server.mover is None:
            server.mover = Mover(server.machine.peer, self.num_blocks, planner=self.planner)
            if self.rules.move == "petals":
                self.at(self.now + self.rng.random() * PETALS_EVERY, lambda: self.petals(server))
        else:
            server.mover = server.mover.arrived(now=self.now)

    def leave(self, peer: str) -> None:
        server = self.servers.pop(peer)
        if self.now >= 0:
            self.result.departures += 1
        self.ghosts[peer] = server.records()
        self.at(self.now + self.rng.uniform(*NOTICED), lambda: self.notice(peer))

    def notice(self, peer: str) -> None:
        """All machines notice that one is gone."""
        del self.ghosts[peer]
        self.lives = self.lives.departed(peer, self.now)
        self.snapshots = [tuple(m for m in snapshot if m.peer != peer) for snapshot in self.snapshots]
        for server in list(self.servers.values()):
            self.look(server)

    def fresh(self) -> tuple[Machine, ...]:
        records = itertools.chain.from_iterable(server.records() for server in self.servers.values())
        return (*records, *itertools.chain.from_iterable(self.ghosts.values()))

    def refresh(self, phase: int) -> None:
        fresh = self.fresh()
        changed = fresh != self.snapshots[phase]
        self.snapshots[phase] = fresh
        self.at(self.now + VIEW_SECONDS, lambda: self.refresh(phase))
        for server in list(self.servers.values()):
            if server.phase == phase and (changed or (server.mover and server.mover.next_look_at <= self.now)):
                self.look(server)

    def look(self, server: Server) -> None:
        """A machine takes a view to its mover, and does what it says."""
        mover = server.mover
        if self.rules.move != "plan" or mover is None or server.span is None:
            return
        if self.servers.get(server.machine.peer) is not server:
            return
        afresh = mover.intended is not None and self.now >= mover.next_look_at
        view = self.fresh() if afresh else self.snapshots[server.phase]
        own = server.records()
        view = (*(m for m in view if m.peer != server.machine.peer), *own)
        lifetimes = self.lives.lifetimes(self.now) if self.rules.lifetimes else None
        server.mover = mover.after_view(view, now=self.now, lifetimes=lifetimes)
        if server.mover.move is not None:
            self.moved(server, server.mover.move.after)
        elif (
            server.mover.next_look_at > self.now and server.mover != mover and server.mover.next_look_at < self.now + 15
        ):
            self.at(server.mover.next_look_at, lambda: self.look(server))

    def planner(
        self, machines: Sequence[Machine], num_blocks: int, now: float, lifetimes: Lifetimes | None
    ) -> tuple[Move, ...]:
        key = (frozenset(machines), round(now / 60) if lifetimes else 0)
        if key not in self.plans:
            began = time.perf_counter()
            self.plans[key] = plan_moves(machines, num_blocks, now=now, lifetimes=lifetimes, scoring=self.scoring)
            self.plan_seconds.append(time.perf_counter() - began)
        return self.plans[key]

    def petals(self, server: Server) -> None:
        if self.servers.get(server.machine.peer) is not server:
            return
        self.at(self.now + PETALS_EVERY, lambda: self.petals(server))
        if server.span is None:
            return
        view = [m for m in self.snapshots[server.phase] if m.peer != server.machine.peer]
        view = [*view, replace(server.machine, span=server.span)]
        span = choose_move(view, server.machine.peer, self.num_blocks, rng=self.rng)
        if span is not None:
            self.moved(server, span)

    def moved(self, server: Server, span: Span) -> None:
        if self.now >= 0:
            self.result.moves += 1
        self.load(server, span)


@dataclass(frozen=True)
class Scenario:
    name: str
    stays: Callable[[int, float], list[Stay]]  # of a seed and hours


def scenarios(traces: Path | None) -> dict[str, Scenario]:
    def weibull(count: int, copies: float, mean_hours: float) -> Callable[[int, float], list[Stay]]:
        return lambda seed, hours: weibull_churn(
            count, NUM_BLOCKS, copies, shape=0.393, mean=mean_hours * 3600, hours=hours, seed=seed
        )

    found = {
        "1h-2.5": weibull(40, 2.5, 1),
        "10h-2.5": weibull(40, 2.5, 10),
        "1h-4": weibull(40, 4, 1),
        "10h-5": weibull(40, 5, 10),
        "1h-6": weibull(40, 6, 1),
        "1h-8": weibull(40, 8, 1),
        "1h-2.5-100": weibull(100, 2.5, 1),
        "1h-2.5-20": weibull(20, 2.5, 1),
    }
    if traces is not None:
        for name, file in (("spot16-3", "spot_16node.json"), ("preempt4-3", "spot_preemption_4node.json")):
            found[name] = lambda seed, hours, file=file: trace_churn(
                traces / file, NUM_BLOCKS, 3, begin=100_000 + 90_000 * seed, hours=hours, seed=seed
            )
    return {name: Scenario(name, stays) for name, stays in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--scoring", default="", help="for tuning: exact=0.5,risk=1 ...")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scoring = scoring_of(arguments.scoring)
    print(describe_machine(), file=sys.stderr)
    if not arguments.json:
        print(
            "| churn | rules | exact | min | holes | moves a departure | median heal s | plan ms |\n"
            "|---|---|---|---|---|---|---|---|"
        )
    for scenario in scenarios(arguments.traces).values():
        if arguments.only and scenario.name not in arguments.only:
            continue
        for name in arguments.rules:
            results, plans = [], list[float]()
            for seed in range(arguments.seeds):
                stays = scenario.stays(seed, arguments.hours)
                run = Churn(
                    stays,
                    RULES[name],
                    hours=arguments.hours,
                    seed=seed,
                    num_blocks=NUM_BLOCKS,
                    scoring=scoring,
                    warm=1200.0,
                )
                results.append(run.run())
                plans += run.plan_seconds
            if arguments.json:
                print(json.dumps([scenario.name, name, [asdict(result) for result in results]]), flush=True)
            else:
                print(row(scenario.name, name, results, plans), flush=True)


def row(scenario: str, rules: str, results: Sequence[Result], plans: Sequence[float]) -> str:
    def cells(values: Sequence[float], form: str) -> str:
        low, high = min(values), max(values)
        return f"{low:{form}} to {high:{form}}" if len(values) > 1 else f"{low:{form}}"

    counted = [result for result in results if result.counted > 0]
    healed = [seconds for result in results for seconds in result.healed]
    departures = sum(result.departures for result in results)
    return (
        " | ".join(
            (
                f"| {scenario}",
                rules,
                cells([r.exact / r.counted for r in counted], ".3f"),
                cells([r.least / r.counted for r in counted], ".3f"),
                cells([100 * r.holes / r.counted for r in counted], ".2f") + " %",
                f"{sum(r.moves for r in results) / max(1, departures):.2f} of {departures}",
                f"{statistics.median(healed):.0f} of {len(healed)}" if healed else "-",
                f"{1000 * statistics.median(plans):.0f}" if plans else "-",
            )
        )
        + " |"
    )


if __name__ == "__main__":
    main()
