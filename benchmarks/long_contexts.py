"""Memory, prefill and decoding speed of one session, by the length of its context.

    python -m benchmarks.long_contexts [--lengths 128 2048 4096 8192 16384 32768] [--blocks 4] [--json]

A model with the shapes of SmolLM2-135M's blocks and random weights, in bfloat16, on two servers on loopback. Each
length has servers and a client of its own, so that peaks of resident memory are of that length. Beside the time of a
token stands what it would be if it grew as the bytes that a step reads: the weights, and the keys and values of all
tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig

from benchmarks.common.clients import generate
from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import made_model
from benchmarks.common.swarm import servers
from shoal import AutoDistributedModelForCausalLM
from shoal.host.processes import interruptible

LENGTHS = (128, 2048, 4096, 8192, 16384, 32768)
DECODED_TOKENS = 24
CACHE_TOKENS = 36 * 1024


def config_of(num_blocks: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=num_blocks,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        max_position_embeddings=1 << 17,
        dtype="bfloat16",
    )


def peak_bytes(process: str) -> int:
    """The peak of a process's resident memory; `process` is its number, or "self"."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def serving_children() -> list[str]:
    """The numbers of the servers that this process started."""
    children = [
        number for task in Path("/proc/self/task").iterdir() for number in (task / "children").read_text().split()
    ]
    return [number for number in children if b"serve" in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")]


def measure(folder: Path, length: int, num_blocks: int) -> dict[str, Any]:
    """One session of this length, whose last tokens are decoded."""
    prompt = torch.randint(2, 4000, (1, length - DECODED_TOKENS), generator=torch.Generator().manual_seed(length))
    spans = [f"{start}:{end}" for start, end in pairwise((0, num_blocks // 2, num_blocks))]
    with servers(folder, spans, "--cache-tokens", str(CACHE_TOKENS), of_last=["--serve-head"]) as address:
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address], dtype="bfloat16")
        generate(model, prompt[:, :16], 2)  # what is imported and connected once
        generation = generate(model, prompt, DECODED_TOKENS)
        return {
            "length": length,
            "prefill_seconds": generation.seconds_to_first,
            "token_seconds": statistics.median(seconds for _, seconds in generation.gaps()),
            "client_bytes": peak_bytes("self"),
            "server_bytes": max(peak_bytes(number) for number in serving_children()),
        }


def step_bytes(folder: Path, length: int, num_blocks: int) -> int:
    """What a step reads: the weights, and the keys and values of all tokens."""
    config = config_of(num_blocks)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    head_size = config.hidden_size // config.num_attention_heads
    return weights + length * num_blocks * 2 * config.num_key_value_heads * head_size * torch.bfloat16.itemsize


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.lengths[0], arguments.blocks)))
        return
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        made_model(config_of(arguments.blocks), folder)
        rows = []
        for length in arguments.lengths:
            own = ("--one", str(folder), "--lengths", str(length), "--blocks", str(arguments.blocks))
            command = [sys.executable, "-m", "benchmarks.long_contexts", *own]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            rows.append({**json.loads(done.stdout), "step_bytes": step_bytes(folder, length, arguments.blocks)})
            print(f"{length} tokens: {rows[-1]}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "load_before": load_before, "rows": rows}, indent=2))
        return
    first = rows[0]
    print(f"{describe_machine()}; load before {load_before:.1f}\n")
    print("| tokens | prefill, s | a token, ms | by the bytes, ms | peak of a server, MB | of the client, MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        by_bytes = first["token_seconds"] * row["step_bytes"] / first["step_bytes"]
        print(
            f"| {row['length']:,} | {row['prefill_seconds']:.1f} | {1e3 * row['token_seconds']:.1f} "
            f"| {1e3 * by_bytes:.1f} | {row['server_bytes'] / 1e6:.0f} | {row['client_bytes'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
