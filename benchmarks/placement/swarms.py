"""Machines for the studies of placement: random swarms, and clusters from a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.policy.machines.machine import Machine
from shoal.policy.placement.plan import DEFAULT_SCORING
from shoal.policy.placement.score import Scoring
from shoal.spans import Span

BLOCK_SPEED = 400.0
"""Median tokens per second of one block."""
FULL_MEMORY = 0.6
"""The speed of a machine whose memory is full of blocks, relative to one with a single block: it has less cache."""
LOAD_SECONDS = 60.0
"""What loading as many blocks as fit takes."""


def scoring_of(text: str) -> Scoring:
    """The scoring of the live servers with some of its weights changed, such as "exact=0.5,risk=1"."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return replace(DEFAULT_SCORING, **{name: float(weight) for name, weight in pairs})


def random_machines(count: int, num_blocks: int, copies: float, *, seed: int) -> list[Machine]:
    """Machines that together could hold each block `copies` times. Sizes and speeds are log-normal."""
    chance = random.Random(seed)
    sizes = [chance.lognormvariate(0.0, 0.5) for _ in range(count)]
    scale = copies * num_blocks / sum(sizes)
    return [
        random_machine(f"server{index:05d}", max(1, min(num_blocks, round(size * scale))), chance)
        for index, size in enumerate(sizes)
    ]


def random_machine(peer: str, max_blocks: int, chance: random.Random) -> Machine:
    speed = BLOCK_SPEED * chance.lognormvariate(0.0, 0.6)
    speeds = ((1, speed), (max_blocks, speed * FULL_MEMORY)) if max_blocks > 1 else ((1, speed),)
    load = LOAD_SECONDS / max_blocks
    return Machine(peer, None, max_blocks, speeds, load_seconds=load, disk_seconds=load)


@dataclass(frozen=True)
class Cluster:
    """Machines of a file, and published placements of them by name."""

    name: str
    num_blocks: int
    machines: tuple[Machine, ...]
    layouts: dict[str, tuple[Machine, ...]]


def clusters(path: Path, models: tuple[str, ...] = ("70b", "30b")) -> Iterator[Cluster]:
    """The clusters of a file in the format of Helix's (its field `format` describes it)."""
    data = json.loads(path.read_text())
    for name, cluster in data["clusters"].items():
        for model in models:
            profiles = cluster["profiles"].get(model)
            if profiles is None:
                continue
            machines = tuple(
                _helix_machine(index, cluster, data["models"][model], profiles)
                for index in range(len(cluster["nodes"]))
            )
            layouts = {
                rule: tuple(replace(machine, span=Span(*span)) for machine, span in zip(machines, spans, strict=True))
                for rule, spans in cluster.get("layouts", {}).get(model, {}).items()
            }
            yield Cluster(f"{name} {model}", data["models"][model]["blocks"], machines, layouts)


def _helix_machine(index: int, cluster: dict[str, Any], model: dict[str, Any], profiles: dict[str, Any]) -> Machine:
    profile = profiles[cluster["nodes"][index]]
    speeds = tuple((length, speed * length) for length, speed in enumerate(profile["tokens_per_s"], start=1))
    network = cluster["uniform_link"][0] / model["activation_bytes"] if "uniform_link" in cluster else math.inf
    load = LOAD_SECONDS / profile["max_blocks"]
    return Machine(
        f"node{index:03d}",
        None,
        profile["max_blocks"],
        speeds,
        network_speed=network,
        load_seconds=load,
        disk_seconds=load,
    )
