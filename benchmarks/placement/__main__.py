"""Placements of machines that stay: joining rules, moves and an offline search, as shares of what no placement passes.

    python -m benchmarks.placement [--clusters FILE] [--search-seconds 12] [--seeds 2] [--only NAME ...] [--json]

Swarms are random, with 1.5 to 6 copies of each block, and the clusters of a file (`benchmarks/placement/swarms.py` says
of which format). Each cell has the min-block share, the exact share and the moves: "min" divides the time of each
server evenly among its blocks, "exact" lets servers share it freely. The offline search starts where the plan ends, and
anneals for the exact throughput.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common.machine import describe_machine
from benchmarks.placement.swarms import Cluster, clusters, random_machines, scoring_of
from shoal.host.processes import interruptible
from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.fleet import Fleet
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs, exact_throughput
from shoal.policy.placement.joining import Rule, choose_blocks
from shoal.policy.placement.petals import choose_move
from shoal.policy.placement.plan import plan_moves
from shoal.policy.placement.score import Changes, ScoredPlacement, Scoring
from shoal.spans import Span

SWARMS = [(14, 80, 1.5), (14, 80, 2.5), (14, 126, 2), (100, 80, 1.5), (100, 80, 3), (100, 126, 1.5), (100, 126, 6)]
OLD = 7 * 86400.0
"""The age of all machines, in seconds: none is expected to vanish soon."""
PROPOSALS = 48
MAX_ROUNDS = 40


def joined(machines: Sequence[Machine], num_blocks: int, rule: Rule, scoring: Scoring, seed: int) -> list[Machine]:
    """The machines join one after another."""
    placed: list[Machine] = []
    for machine in machines:
        found = choose_blocks(machine, placed, num_blocks, rule=rule, rng=random.Random(seed), scoring=scoring)
        placed.append(replace(machine, span=found.span))
    return placed


def with_petals_moves(machines: Sequence[Machine], num_blocks: int, seed: int) -> tuple[list[Machine], int]:
    """Each moves in turn by PETALS' rule, until none does."""
    rng, machines, moves = random.Random(seed), list(machines), 0
    for _ in range(MAX_ROUNDS):
        order, before = rng.sample(range(len(machines)), len(machines)), moves
        for index in order:
            span = choose_move(machines, machines[index].peer, num_blocks, rng=rng)
            if span is not None:
                machines[index] = replace(machines[index], span=span)
                moves += 1
        if moves == before:
            break
    return machines, moves


def with_plans(machines: Sequence[Machine], num_blocks: int, scoring: Scoring) -> tuple[list[Machine], int]:
    """All make their moves of plan after plan, until a plan is empty."""
    placed, moves = {machine.peer: machine for machine in machines}, 0
    while plan := plan_moves(list(placed.values()), num_blocks, now=OLD, scoring=scoring):
        for move in plan:
            placed[move.peer] = replace(placed[move.peer], span=move.after)
        moves += len(plan)
    return list(placed.values()), moves


def searched(machines: Sequence[Machine], num_blocks: int, seconds: float, seed: int) -> list[Machine]:
    """The best exact throughput that annealing finds in this time, from a placement that is given.

    Its energy is what blocks lack of a target a little above the best so far. Of some random moves, one is drawn by
    their energies at the present temperature.
    """
    rng = np.random.default_rng(seed)
    fleet = Fleet.of(machines, num_blocks, now=OLD)
    start = list(fleet.machines)
    best = exact_throughput(start, num_blocks)
    best_fleet, bound = fleet, throughput_bound(machines, num_blocks)
    placement = ScoredPlacement.of(fleet, Scoring(), bound)
    target = max(best * 1.02, bound * 0.05)
    began = time.monotonic()
    while (spent := (time.monotonic() - began) / seconds) < 1:
        changes = _proposals(placement, target, rng)
        lacking = num_blocks * target - placement.exact_sums(changes, np.array([target]))[:, 0]
        temperature = target * 0.5 * (1 - spent) ** 2 + 1e-9
        chosen = int((-lacking / temperature + rng.gumbel(size=len(lacking))).argmax())
        row, span = int(changes.rows[chosen]), (int(changes.starts[chosen]), int(changes.ends[chosen]))
        if row >= 0:
            starts, ends = placement.fleet.starts.copy(), placement.fleet.ends.copy()
            starts[row], ends[row] = span
            placement = ScoredPlacement.of(replace(placement.fleet, starts=starts, ends=ends), Scoring(), bound)
        if lacking[chosen] <= 1e-6 * target * num_blocks or rng.random() < 0.02:
            value = exact_throughput(_placed(placement.fleet), num_blocks)
            if value > best:
                best, best_fleet = value, placement.fleet
                target = best * 1.01
    return _placed(best_fleet)


def _placed(fleet: Fleet) -> list[Machine]:
    return [
        replace(machine, span=Span(int(start), int(end)))
        for machine, start, end in zip(fleet.machines, fleet.starts, fleet.ends, strict=True)
    ]


def _proposals(placement: ScoredPlacement, target: float, rng: np.random.Generator) -> Changes:
    """Random moves, half of them to blocks that lack something; the first is to stay."""
    fleet, num_blocks = placement.fleet, placement.fleet.num_blocks
    rows = rng.integers(len(fleet.machines), size=PROPOSALS)
    lengths = 1 + (rng.random(PROPOSALS) * fleet.kinds.longest[fleet.kind[rows]]).astype(np.int64)
    starts = (rng.random(PROPOSALS) * (num_blocks - lengths + 1)).astype(np.int64)
    weak = np.argsort(placement.even + rng.random(num_blocks) * target * 0.3)[: max(1, num_blocks // 8)]
    aimed = rng.choice(weak, PROPOSALS) - (rng.random(PROPOSALS) * lengths).astype(np.int64)
    starts = np.where(rng.random(PROPOSALS) < 0.5, np.clip(aimed, 0, num_blocks - lengths), starts)
    rows[0] = -1
    return Changes(rows, starts, np.where(rows < 0, starts, starts + lengths))


def studied(seeds: int, path: Path | None) -> Iterator[tuple[Cluster, int]]:
    if path is not None:
        for cluster in clusters(path):
            for seed in range(seeds):
                machines = list(cluster.machines)
                random.Random(seed).shuffle(machines)
                yield replace(cluster, machines=tuple(machines)), seed
    for count, num_blocks, copies in SWARMS:
        for seed in range(seeds):
            machines = tuple(random_machines(count, num_blocks, copies, seed=seed))
            yield Cluster(f"{count}x{num_blocks}, {copies} copies", num_blocks, machines, {}), seed


def shares(
    machines: Sequence[Machine], moves: int | None = None, *, num_blocks: int, bound: float, absolute: bool
) -> str:
    """A placement as min and exact share of the bound, in tokens per second too if `absolute`, and its moves."""
    least, exact = min(block_throughputs(machines, num_blocks)), exact_throughput(machines, num_blocks)
    figures = f" ({least:.0f}/{exact:.0f})" if absolute else ""
    return f"{least / bound:.2f}/{exact / bound:.3f}{figures}" + ("" if moves is None else f", {moves}")


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=Path)
    parser.add_argument("--search-seconds", type=float, default=12.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--no-petals", action="store_true", help="leave out PETALS' rules, which take longest")
    parser.add_argument("--scoring", default="", help="for tuning: exact=0.5,risk=1 ...")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scoring = scoring_of(arguments.scoring)
    print(describe_machine(), file=sys.stderr)
    if not arguments.json:
        columns = [
            "swarm",
            "seed",
            "bound",
            "published",
            "PETALS",
            "+ moves",
            "graded",
            "+ plan",
            "search",
            "plan/search",
        ]
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for cluster, seed in studied(arguments.seeds, arguments.clusters):
        if arguments.only and not any(part in cluster.name for part in arguments.only):
            continue
        bound = throughput_bound(cluster.machines, cluster.num_blocks)

        cell = functools.partial(shares, num_blocks=cluster.num_blocks, bound=bound, absolute=bool(cluster.layouts))

        published = "; ".join(f"{name} {cell(layout)}" for name, layout in cluster.layouts.items())
        cells = [cluster.name, str(seed), f"{bound:.0f}", published or "-"]
        if not arguments.no_petals:
            petals = joined(cluster.machines, cluster.num_blocks, "petals", scoring, seed)
            cells += [cell(petals), cell(*with_petals_moves(petals, cluster.num_blocks, seed))]
        else:
            cells += ["-", "-"]
        graded = joined(cluster.machines, cluster.num_blocks, "graded", scoring, seed)
        planned, moves = with_plans(graded, cluster.num_blocks, scoring)
        best = searched(planned, cluster.num_blocks, arguments.search_seconds, seed)
        ratio = exact_throughput(planned, cluster.num_blocks) / exact_throughput(best, cluster.num_blocks)
        cells += [cell(graded), cell(planned, moves), cell(best), f"{ratio:.3f}"]
        print(json.dumps(cells) if arguments.json else "| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
