"""Ten thousand servers that come and go, and thousands of clients: what placement, views and routes cost and reach."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np

from shoal.policy.machines.machine import Machine
from shoal.simulator.fluid.arrangement import EPOCH, Delays, Scene
from shoal.simulator.fluid.measures import Summary
from shoal.simulator.fluid.rules import SharedPlan
from shoal.simulator.steps.routing_client import Habits, Talk, Tally
from shoal.simulator.steps.traffic import Load, Traffic
from shoal.simulator.studies.report import Report, Table, percent, seconds, share
from shoal.simulator.studies.settings import HOUR
from shoal.simulator.studies.study_progress import Advance, progress
from shoal.simulator.world.hardware import Hardware, draw_hardware, typical_of
from shoal.simulator.world.stays import volunteers
from shoal.spans import Span

NUM_KINDS = 40
"""Kinds of machines: ten thousand volunteers have many, but not ten thousand, kinds of hardware."""
MEAN_LIFE = 10 * HOUR
MEASURE_SECONDS = 60.0


@dataclass(frozen=True)
class Size:
    """How large the simulated swarm is, and how long it is followed."""

    num_machines: int = 10_000
    num_blocks: int = 80
    num_clients: int = 5_000
    quiet_seconds: float = 1800.0
    """With churn only, before the clients come."""
    busy_seconds: float = 60.0
    """With clients too."""
    ramp: float = 30.0
    mean_size: float = 8.0
    kept: int = 300
    """Records that a client keeps."""


@dataclass(frozen=True)
class Large:
    """What was found: `wall_seconds` is how long the simulation took, `step_seconds` its part with clients."""

    size: Size
    summary: Summary
    tally: Tally
    num_plans: int
    wall_seconds: float
    step_wall_seconds: float
    read_megabytes: float


class Crowd(SharedPlan):
    """The shared plan, where a newcomer sees a sample of the others: to place it by all would take too long here.

    Its first members go one after another to the weakest blocks, with the length at which they compute most. The swarm
    is old; how it began does not matter.
    """

    def __init__(self, num_blocks: int, *, sample: int = 400) -> None:
        super().__init__(selective=True)
        self._sample = sample
        self._power = np.zeros(num_blocks)

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        if machine.up_since > EPOCH:
            seen = rng.sample(others, min(self._sample, len(others)))
            return super().join(machine, seen, num_blocks, now=now, rng=rng)
        lengths = range(1, min(machine.max_blocks, num_blocks) + 1)
        length = max(lengths, key=lambda each: machine.speed(each) * each)
        sums = np.convolve(self._power, np.ones(length), "valid")
        start = int(sums.argmin())
        self._power[start : start + length] += machine.speed(length)
        return Span(start, start + length)


def draw_talk(rng: random.Random) -> Talk:
    """A request of a chat: a prompt of 200 tokens and an answer of 100, both with a long tail, and a pause."""
    prompt = min(2000, max(8, round(rng.lognormvariate(5.0, 0.8))))
    answer = min(500, max(4, round(rng.lognormvariate(4.3, 0.7))))
    return Talk(prompt, answer, rng.expovariate(1 / 20.0))


def study(size: Size, *, seed: int, advance: Advance) -> Large:
    """One run."""
    began = time.monotonic()
    total = size.quiet_seconds + size.busy_seconds + size.ramp
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    kinds = [_kind(rng, size) for _ in range(NUM_KINDS)]
    scene = Scene(
        size.num_blocks,
        volunteers(rng, num_machines=size.num_machines, mean_life=MEAN_LIFE, seconds=total),
        lambda slot: kinds[slot * 2654435761 % 2**32 % NUM_KINDS],
        total,
        warm_up=size.quiet_seconds / 3,
        measure_every=MEASURE_SECONDS,
        delays=Delays(cohorts=1, watched=0),
    )
    rule = Crowd(size.num_blocks)
    load = Load(
        size.num_clients,
        Habits(draw_talk),
        num_places=100,
        num_training=size.num_clients // 100,
        ramp=size.ramp,
        kept=size.kept,
    )
    traffic = Traffic(scene, rule, load, seed=seed)
    _advance(traffic, 0.0, size.quiet_seconds, total, advance, "churn")
    quiet = time.monotonic()
    traffic.start()
    _advance(traffic, size.quiet_seconds, total, total, advance, "churn and clients")
    board = traffic.arrangement.board
    return Large(
        size,
        traffic.arrangement.summary(),
        traffic.tally,
        rule.num_plans,
        time.monotonic() - began,
        time.monotonic() - quiet,
        board.read_bytes / 1e6,
    )


def study_all(sizes: Sequence[Size], *, seed: int, jobs: int) -> list[Large]:
    """All sizes, `jobs` at a time, each in a process of its own."""
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        return list(pool.map(partial(_study_one, seed=seed, as_lines=jobs > 1), sizes))


def _study_one(size: Size, *, seed: int, as_lines: bool) -> Large:
    with progress(f"{size.num_machines} servers, {size.num_blocks} blocks", as_lines=as_lines) as advance:
        return study(size, seed=seed, advance=advance)


def _advance(traffic: Traffic, at: float, until: float, total: float, advance: Advance, now: str) -> None:
    while at < until:
        step = min(10.0, until - at)
        at += step
        traffic.arrangement.advance(at)
        advance(step / total, now)


def _kind(rng: random.Random, size: Size) -> Hardware:
    return draw_hardware(rng, typical_blocks=typical_of(size.mean_size), most_blocks=size.num_blocks)


def report(found: Sequence[Large]) -> Report:
    """A column for each size."""
    rows: list[tuple[str, ...]] = [
        ("servers, blocks", *(f"{each.summary.num_machines:,.0f} x {each.size.num_blocks}" for each in found)),
        ("copies of each block", *(f"{each.summary.copies:.0f}" for each in found)),
        ("departures, moves", *(f"{each.summary.num_departures}, {each.summary.num_moves}" for each in found)),
        ("exact, of the bound", *(share(each.summary.exact) for each in found)),
        ("time with a hole", *(percent(each.summary.hole) for each in found)),
        ("clients, tokens/s", *(f"{each.size.num_clients:,}, {_speed(each):,.0f}" for each in found)),
        ("first token, median and 95 %", *(_pair(each.tally.first_tokens) for each in found)),
        ("next token, median and 95 %", *(_pair(each.tally.gaps) for each in found)),
        ("recoveries, median", *(_recoveries(each.tally) for each in found)),
        ("different plans computed", *(str(each.num_plans) for each in found)),
        ("records of all servers, under all keys", *(f"{each.read_megabytes:.0f} MB" for each in found)),
        ("simulated, with clients", *(_simulated(each.size) for each in found)),
        ("took, with clients", *(f"{each.wall_seconds:.0f} s, {each.step_wall_seconds:.0f} s" for each in found)),
    ]
    headings = ("", *(f"{each.size.num_blocks} blocks" for each in found))
    return Report("ten-thousand", "Ten thousand servers", (Table(headings, tuple(rows)),))


def _speed(found: Large) -> float:
    return found.tally.num_tokens / found.size.busy_seconds


def _simulated(size: Size) -> str:
    return f"{(size.quiet_seconds + size.ramp + size.busy_seconds) / 60:.0f} min, {size.busy_seconds / 60:.0f} min"


def _pair(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=20)
    return f"{cuts[9]:.2f} s, {cuts[18]:.2f} s"


def _recoveries(tally: Tally) -> str:
    if not tally.recoveries:
        return "0"
    return f"{len(tally.recoveries)}, {seconds(statistics.median(tally.recoveries))}"
