"""What `wire="auto"` saves: bytes and seconds of prefills in bfloat16, packed where that is faster, and never packed.

    python -m benchmarks.wire.packing [--quick] [--model FOLDER] [--networks NAME ...] [--rounds 5] [--json]

Two servers, each a process behind a proxy that shapes its link (docs/testing.md), have half of the blocks each. On each
network, two clients take turns with prompts that no server knows, one with `wire="auto"` and one with `wire="raw"`,
after first prompts, from which peers learn how fast the lines are. A time is that until the first token. Bytes are all
that the proxies forwarded until the network is quiet, to and from clients and between servers.

`--quick` only checks that the script runs, with the bundled model, whose prefills are too small to be packed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
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

NETWORKS = {
    "loopback": Link(),
    "1 Gbit/s, round trip 4 ms": Link(delay_seconds=0.002, bytes_per_second=1e9 / 8),
    "100 Mbit/s, round trip 4 ms": Link(delay_seconds=0.002, bytes_per_second=100e6 / 8),
    "100 Mbit/s, round trip 100 ms": Link(delay_seconds=0.05, bytes_per_second=100e6 / 8),
}
WIRES = ("auto", "raw")
WARM_UP = 2
"""Prompts before the first that counts. Each has several messages, and a line is as fast as the last eight show."""
NUM_TOKENS = 4
"""What is generated: a session that ends after one token is closed before its servers have sent all inputs back."""
QUIET_SECONDS, QUIET_BYTES = 0.5, 20_000
"""The network is quiet when so little was forwarded for this long: servers send inputs for a replay after the outputs,
and measure their network."""


@dataclass(frozen=True)
class Row:
    """A network: medians of seconds and bytes with each wire, and of the ratios within a round."""

    network: str
    auto_seconds: float
    raw_seconds: float
    auto_bytes: int
    raw_bytes: int
    seconds_ratio: float
    bytes_ratio: float


def prefill(swarm: ShapedSwarm, model: Any, num_tokens: int, chance: torch.Generator) -> tuple[float, int]:
    """Seconds until the first token of a new prompt, and the bytes of all proxies meanwhile."""
    prompt = torch.randint(3, model.config.vocab_size, (1, num_tokens), generator=chance)
    before = _num_bytes(swarm)
    seconds = generate(model, prompt, NUM_TOKENS).seconds_to_first
    last, after = before, _num_bytes(swarm)
    while after - last > QUIET_BYTES:
        time.sleep(QUIET_SECONDS)
        last, after = after, _num_bytes(swarm)
    return seconds, after - before


def _num_bytes(swarm: ShapedSwarm) -> int:
    return sum(each.traffic.inward_bytes + each.traffic.outward_bytes for each in swarm.servers)


def measure(folder: Path, networks: Sequence[str], num_tokens: int, rounds: int) -> list[Row]:
    num_blocks = AutoConfig.from_pretrained(folder).num_hidden_layers
    spans = [f"0:{num_blocks // 2}", f"{num_blocks // 2}:{num_blocks}"]
    rows, chance = [], torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack:
        options = ["--cache-tokens", str(8 * num_tokens), "--dtype", "bfloat16"]
        swarm = stack.enter_context(shaped_swarm(folder, spans, options=options, num_threads=None))
        models = {}
        for wire in WIRES:
            models[wire] = AutoDistributedModelForCausalLM.from_pretrained(
                folder, initial_peers=swarm.addresses, dtype=torch.bfloat16, wire=wire, audits="off"
            )
            stack.callback(models[wire].close)
        for network in networks:
            for server in swarm.servers:
                server.link(NETWORKS[network])
            found: dict[str, list[tuple[float, int]]] = {wire: [] for wire in WIRES}
            for index in range(WARM_UP + rounds):
                for wire in WIRES if index % 2 else reversed(WIRES):
                    taken = prefill(swarm, models[wire], num_tokens, chance)
                    print(f"{network}, {wire}, round {index}: {taken[0]:.3g} s, {taken[1]:,} bytes", file=sys.stderr)
                    if index >= WARM_UP:
                        found[wire].append(taken)
            rows.append(_row(network, found["auto"], found["raw"]))
    return rows


def _row(network: str, auto: Sequence[tuple[float, int]], raw: Sequence[tuple[float, int]]) -> Row:
    ratios = [(one[0] / other[0], one[1] / other[1]) for one, other in zip(auto, raw, strict=True)]
    return Row(
        network,
        auto_seconds=statistics.median(seconds for seconds, _ in auto),
        raw_seconds=statistics.median(seconds for seconds, _ in raw),
        auto_bytes=round(statistics.median(num_bytes for _, num_bytes in auto)),
        raw_bytes=round(statistics.median(num_bytes for _, num_bytes in raw)),
        seconds_ratio=statistics.median(seconds for seconds, _ in ratios),
        bytes_ratio=statistics.median(num_bytes for _, num_bytes in ratios),
    )


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.model or (STORIES if arguments.quick else reference_model())
    load_before = os.getloadavg()[0]
    num_tokens = min(64, arguments.tokens) if arguments.quick else arguments.tokens
    rows = measure(folder, arguments.networks, num_tokens, arguments.rounds or (1 if arguments.quick else 5))
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        print(json.dumps({**about, "rows": [asdict(each) for each in rows]}, indent=2))
        return
    print(f"{describe_machine()}; load before {load_before:.1f}; {folder.name}, {num_tokens} tokens\n")
    print("| network | raw, s | auto, s | ratio | raw, MB | auto, MB | ratio |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.network} | {row.raw_seconds:.3g} | {row.auto_seconds:.3g} | **{row.seconds_ratio:.2f}** "
            f"| {row.raw_bytes / 1e6:.2f} | {row.auto_bytes / 1e6:.2f} | **{row.bytes_ratio:.2f}** |"
        )


if __name__ == "__main__":
    main()
