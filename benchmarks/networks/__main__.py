"""The cost of slow networks: one client and four servers, from loopback to 100 Mbit/s with a round trip of 100 ms.

    python -m benchmarks.networks [--quick] [--networks NAME ...] [--contexts 128 2048]
                                  [--batches 1 64] [--rounds 3] [--no-offload] [--json]

Each server is a process behind a proxy that shapes its link (docs/testing.md), with four blocks of the reference model
in bf16. The networks take turns on the same servers. Ratios compare figures of the same round; the table has their
medians. Each figure is compared with the unshaped servers, and with a bound: the unshaped time plus n + 1 trips
(client, n servers, client), one after another, each with the delay and the bytes of one message. Messages of a forward
pass have at most 1,024 tokens; all but the first may travel while others are computed. The last row is one machine that
reads the blocks from its disk at each step (benchmarks/networks/offload.py). It is measured before the servers start.

`--quick` only checks that the script runs, with the bundled model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from benchmarks.common.clients import generate
from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.host.processes import interruptible
from shoal.testing import Link, ShapedSwarm, shaped_swarm

NUM_STAGES = 4
FORWARD_TOKENS = 128
MESSAGE_TOKENS = 1024
GOAL = 0.9

UNSHAPED = "unshaped"
NETWORKS = {
    UNSHAPED: Link(),
    "1gbit-4ms": Link(delay_seconds=0.002, bytes_per_second=1e9 / 8),
    "100mbit-4ms": Link(delay_seconds=0.002, bytes_per_second=100e6 / 8),
    "100mbit-100ms": Link(delay_seconds=0.05, bytes_per_second=100e6 / 8),
}
TITLES = {
    UNSHAPED: "unshaped",
    "1gbit-4ms": "1 Gbit/s, round trip 4 ms",
    "100mbit-4ms": "100 Mbit/s, round trip 4 ms",
    "100mbit-100ms": "100 Mbit/s, round trip 100 ms",
}
OFFLOADED = "one machine, weights from its disk"


@dataclass(frozen=True)
class Scale:
    """How much is measured, of which model."""

    model: Path
    contexts: tuple[int, ...]
    num_steps: int
    batch_sizes: tuple[int, ...]
    rounds: int

    @property
    def spans(self) -> list[str]:
        num_blocks = AutoConfig.from_pretrained(self.model).num_hidden_layers
        bounds = [num_blocks * stage // NUM_STAGES for stage in range(NUM_STAGES + 1)]
        return [f"{start}:{end}" for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Load:
    """A workload: decoding steps after a context, or forward passes of a batch."""

    kind: str  # "decode" or "forward"
    size: int
    """Tokens of context, or sequences of `FORWARD_TOKENS`."""

    @property
    def title(self) -> str:
        return f"context {self.size}" if self.kind == "decode" else f"{self.size}x{FORWARD_TOKENS}"

    @property
    def message_tokens(self) -> int:
        return 1 if self.kind == "decode" else min(MESSAGE_TOKENS, self.size * FORWARD_TOKENS)

    @property
    def num_units(self) -> int:
        """The units that its speed counts: one step, or the tokens of a pass."""
        return 1 if self.kind == "decode" else self.size * FORWARD_TOKENS


@dataclass(frozen=True)
class Figure:
    """The median seconds of a workload on a network, and its ratios to the unshaped network and to the bound."""

    network: str
    load: Load
    seconds: float
    of_unshaped: float
    of_bound: float

    @property
    def speed(self) -> float:
        return self.load.num_units / self.seconds


def bound_seconds(unshaped_seconds: float, link: Link, message_bytes: int) -> float:
    """Seconds of a step whose messages make n + 1 trips, one after another."""
    trip = link.delay_seconds + (message_bytes / link.bytes_per_second if link.bytes_per_second else 0.0)
    return unshaped_seconds + (NUM_STAGES + 1) * trip


def decode(model: Any, load: Load, num_steps: int) -> float:
    """Median seconds of a decoding step."""
    chance = torch.Generator().manual_seed(load.size)
    prompt = torch.randint(3, model.config.vocab_size, (1, load.size), generator=chance)
    # The first token waits for the prompt, and the second may still wait for its remains.
    _, *gaps = generate(model, prompt, num_steps + 2).gaps()
    return statistics.median(seconds for _, seconds in gaps)


@torch.no_grad()
def forward(model: Any, load: Load) -> float:
    """Seconds of a forward pass of a batch through all blocks, without a cache."""
    hidden = torch.randn(load.size, FORWARD_TOKENS, model.config.hidden_size, dtype=model.dtype)
    began = time.perf_counter()
    model.transformer.h(hidden)
    return time.perf_counter() - began


def seconds_of(
    swarm: ShapedSwarm, model: Any, networks: Sequence[str], scale: Scale
) -> Iterator[tuple[str, Load, float]]:
    """All measurements, in turns. The first round warms up, on the unshaped network only."""
    loads = [Load("decode", each) for each in scale.contexts] + [Load("forward", each) for each in scale.batch_sizes]
    for index in range(scale.rounds + 1):
        for network in networks if index else [UNSHAPED]:
            for server in swarm.servers:
                server.link(NETWORKS[network])
            for load in loads:
                seconds = decode(model, load, scale.num_steps) if load.kind == "decode" else forward(model, load)
                print(f"round {index}, {TITLES[network]}, {load.kind} {load.title}: {seconds:.4g} s", file=sys.stderr)
                if index:
                    yield network, load, seconds


def measure(networks: Sequence[str], scale: Scale) -> list[Figure]:
    with contextlib.ExitStack() as stack:
        cache_tokens = str(2 * (max(scale.contexts) + scale.num_steps + 64))
        swarm = stack.enter_context(
            shaped_swarm(scale.model, scale.spans, options=["--cache-tokens", cache_tokens], num_threads=None)
        )
        model = AutoDistributedModelForCausalLM.from_pretrained(
            scale.model, initial_peers=swarm.addresses, dtype=torch.bfloat16
        )
        stack.callback(model.close)
        message_bytes = model.config.hidden_size * model.dtype.itemsize
        found: dict[tuple[str, Load], list[float]] = {}
        for network, load, seconds in seconds_of(swarm, model, networks, scale):
            found.setdefault((network, load), []).append(seconds)
    figures = []
    for (network, load), several in found.items():
        unshaped = found[UNSHAPED, load]
        bounds = [bound_seconds(each, NETWORKS[network], load.message_tokens * message_bytes) for each in unshaped]
        figures.append(
            Figure(
                network,
                load,
                statistics.median(several),
                of_unshaped=statistics.median(map(operator.truediv, unshaped, several)),
                of_bound=statistics.median(map(operator.truediv, bounds, several)),
            )
        )
    return figures


def offloaded(scale: Scale) -> dict[str, Any]:
    """The figures of the disk. Its process ends before servers map the same files, whose pages could not be dropped."""
    command = [sys.executable, "-m", "benchmarks.networks.offload", "--model", str(scale.model), "--json"]
    command += ["--contexts", *map(str, scale.contexts), "--batches", *map(str, scale.batch_sizes)]
    done: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return done


def print_table(
    kind: str, unit: str, networks: Sequence[str], figures: Sequence[Figure], disk: dict[str, float]
) -> None:
    of_kind = {(figure.network, figure.load): figure for figure in figures if figure.load.kind == kind}
    loads = sorted({load for _, load in of_kind}, key=lambda load: load.size)
    columns = [f"{load.title}, {unit} | ratio to unshaped | ratio to the bound" for load in loads]
    print(f"| {kind} | " + " | ".join(columns) + " |")
    print("|---" * (3 * len(loads) + 1) + "|")
    for network in networks:
        row = [of_kind[network, load] for load in loads]
        cells = [f"{each.speed:.3g} | {each.of_unshaped:.2f} | **{each.of_bound:.2f}**" for each in row]
        print(f"| {TITLES[network]} | " + " | ".join(cells) + " |")
    if disk:
        unshaped = {load: of_kind[UNSHAPED, load].speed for load in loads}
        cells = [f"{disk[str(load.size)]:.3g} | {disk[str(load.size)] / unshaped[load]:.3f} | " for load in loads]
        print(f"| {OFFLOADED} | " + " | ".join(cells) + "|")
    print()


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", help=f"sequences of {FORWARD_TOKENS} tokens in a pass")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-offload", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    scale = Scale(
        model=STORIES if arguments.quick else reference_model(),
        contexts=tuple(arguments.contexts or ((16, 64) if arguments.quick else (128, 2048))),
        num_steps=8 if arguments.quick else 24,
        batch_sizes=tuple(arguments.batches or ((1, 8) if arguments.quick else (1, 64))),
        rounds=arguments.rounds or (1 if arguments.quick else 3),
    )
    networks = [network for network in NETWORKS if network == UNSHAPED or network in arguments.networks]
    load_before = os.getloadavg()[0]
    disk = {} if arguments.no_offload else offloaded(scale)
    figures = measure(networks, scale)

    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        rows = [asdict(each) for each in figures]
        print(json.dumps({**about, "rounds": scale.rounds, "figures": rows, "offloaded": disk}, indent=2))
        return
    print(f"{describe_machine()}; load before {load_before:.1f}\n")
    print_table("decode", "steps/s", networks, figures, disk.get("steps_per_second", {}))
    print_table("forward", "tokens/s", networks, figures, disk.get("forward_tokens_per_second", {}))
    if disk:
        print(
            f"From the disk: {disk['read_bytes'] / 1e9:.2f} GB read per step, of {disk['weight_bytes'] / 1e9:.2f} GB."
        )
    for each in figures:
        if not arguments.quick and each.network == "100mbit-100ms" and each.load.kind == "decode":
            verdict = "met" if each.of_bound >= GOAL else "missed"
            print(f"At 100 ms, {each.load.title}: {each.of_bound:.2f} of the bound; goal ≥ {GOAL}: {verdict}")


if __name__ == "__main__":
    main()
