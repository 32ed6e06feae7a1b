"""Swarms in which no machine comes or goes: what each rule reaches, compared with an offline search.

The machines join one after another, and move until none wants to. On clusters from a file, published placements are
rows too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs, exact_throughput
from shoal.simulator.fluid.arrangement import EPOCH, Arrangement, Delays, Scene
from shoal.simulator.fluid.rules import Rule
from shoal.simulator.others.central import Allocate, allocation
from shoal.simulator.others.greedy_chains import greedy_chains
from shoal.simulator.others.parallax import parallax
from shoal.simulator.studies.offline_search import search
from shoal.simulator.studies.report import Report, Table, share
from shoal.simulator.studies.rule_names import rule_of
from shoal.simulator.studies.study_progress import Advance
from shoal.simulator.world.clusters import Cluster
from shoal.simulator.world.hardware import EVEN, SLOW_WHEN_FULL, Hardware, draw_swarm
from shoal.simulator.world.stays import Stay

SETTLE_SECONDS = 3 * 3600.0
"""Long enough for all moves of a swarm at rest."""
AGE = 7 * 86400.0
"""The age of the machines when they join: none is expected to vanish soon."""
ALLOCATORS: dict[str, Allocate] = {"Parallax": parallax, "GBP-CR": greedy_chains}
RULES = ("no moves", "PETALS", "graded joining", "shared plan", "Parallax", "GBP-CR")
SWARMS = ((14, 80, 1.5), (100, 80, 1.5), (100, 80, 3.0), (100, 126, 6.0))
"""Random swarms: machines, blocks, copies."""


@dataclass(frozen=True)
class Outcome:
    """What a placement reaches, in tokens per second."""

    rule: str
    minimum: float
    exact: float
    num_moves: int | None = None


@dataclass(frozen=True)
class Rest:
    """A swarm at rest and its placements; the offline search is one of them."""

    name: str
    bound: float
    outcomes: tuple[Outcome, ...]


def random_clusters(seed: int) -> list[Cluster]:
    """Random swarms of the sizes of `SWARMS`, of machines that are as fast when they are full, and of others."""
    found = []
    for about, cache_factors in (("", EVEN), (", slow when full", SLOW_WHEN_FULL)):
        for num_machines, num_blocks, copies in SWARMS:
            rng = random.Random(f"{seed} {num_machines} {num_blocks} {copies}")  # noqa: S311 - repeatable, not secret
            machines = draw_swarm(
                rng, num_machines=num_machines, num_blocks=num_blocks, copies=copies, cache_factors=cache_factors
            )
            name = f"{num_machines}x{num_blocks}, {copies:g} copies{about}"
            found.append(Cluster(name, num_blocks, tuple(machines), {}))
    return found


def study(cluster: Cluster, rules: Sequence[str], *, num_tries: int, seed: int, advance: Advance) -> Rest:
    """All placements of one cluster."""
    machines = [hardware.machine(_peer(index), None) for index, hardware in enumerate(cluster.machines)]
    blocks = cluster.num_blocks
    outcomes: list[Outcome] = []
    for name, spans in cluster.layouts.items():
        placed = [replace(machine, span=span) for machine, span in zip(machines, spans, strict=True)]
        outcomes.append(outcome(f"{name}, published", placed, blocks))
    part = 1 / (len(rules) + 1)
    best: list[Machine] = []
    for rule in rules:
        if rule in ALLOCATORS:
            spread = allocation(ALLOCATORS[rule], machines, blocks)
            placed = [replace(machine, span=spread[machine.peer]) for machine in machines]
            outcomes.append(outcome(rule, placed, blocks))
        else:
            settled, num_moves = settle(cluster.machines, blocks, rule_of(rule), seed=seed)
            outcomes.append(replace(outcome(rule, settled, blocks), num_moves=num_moves))
            placed = list(settled)
        if not best or exact_throughput(placed, blocks) > exact_throughput(best, blocks):
            best = placed
        advance(part, f"{cluster.name}, {rule}")
    # Once from scratch, and once from the best placement of a rule: an offline search must not be worse than those.
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    searched = [search(begin, blocks, num_tries=num_tries, rng=rng) for begin in (machines, best)]
    found = max(searched, key=lambda each: each.exact)
    outcomes.append(outcome("offline search", found.machines, blocks))
    advance(part, f"{cluster.name}, offline search")
    return Rest(cluster.name, throughput_bound(machines, blocks), tuple(outcomes))


def _peer(index: int) -> str:
    return f"s{index:06d}"


def outcome(name: str, machines: Sequence[Machine], num_blocks: int) -> Outcome:
    """What placed machines reach."""
    return Outcome(name, min(block_throughputs(machines, num_blocks)), exact_throughput(machines, num_blocks))


def settle(machines: Sequence[Hardware], num_blocks: int, rule: Rule, *, seed: int) -> tuple[tuple[Machine, ...], int]:
    """The machines after all have joined and moved, and how many moves that took."""
    stays = [Stay(-AGE, float("inf"), slot) for slot in range(len(machines))]
    scene = Scene(
        num_blocks, stays, machines.__getitem__, SETTLE_SECONDS, measure_every=SETTLE_SECONDS, delays=Delays()
    )
    arrangement = Arrangement(scene, rule, seed=seed)
    arrangement.advance(SETTLE_SECONDS)
    assert arrangement.now == EPOCH + SETTLE_SECONDS
    return tuple(member.machine() for member in arrangement.members.values()), arrangement.meter.num_moves


def report(rests: Sequence[Rest]) -> Report:
    """A row for each swarm and rule: tokens per second, and shares of the bound and of the offline search."""
    rows: list[tuple[str, ...]] = []
    for rest in rests:
        best = next(each.exact for each in rest.outcomes if each.rule == "offline search")
        for index, each in enumerate(rest.outcomes):
            rows.append(
                (
                    rest.name if not index else "",
                    each.rule,
                    f"{each.minimum:.0f}",
                    f"{each.exact:.0f}",
                    share(each.minimum / rest.bound),
                    share(each.exact / rest.bound),
                    share(each.exact / best),
                    "" if each.num_moves is None else str(each.num_moves),
                )
            )
    headings = ("swarm", "rule", "min, tokens/s", "exact", "min of bound", "exact of bound", "of search", "moves")
    return Report("at-rest", "Placements of swarms at rest", (Table(headings, tuple(rows)),))
