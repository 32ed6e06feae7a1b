"""One machine with too little memory: Transformers and Accelerate read the blocks from its disk at each step.

    python -m benchmarks.networks.offload [--model FOLDER] [--contexts 128] [--steps 5] [--batches 1 64] [--json]

Before each step, the files' pages are dropped from the system's cache (POSIX_FADV_DONTNEED, which needs no root). The
result has the bytes that the system then read. The cache of a virtual machine's host cannot be dropped from here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from shoal.host.processes import interruptible

FORWARD_TOKENS = 128


def drop_cached_pages(folder: Path) -> None:
    """Make the system drop the cached pages of a model's files."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def open_model(folder: Path, scratch: str) -> Any:
    """The model with its blocks on disk. The parts that a client of a swarm holds are in memory."""
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    decoder = meta.get_decoder()
    layers = next(name for name, child in decoder.named_children() if isinstance(child, torch.nn.ModuleList))
    prefix = next(name for name, child in meta.named_children() if child is decoder)
    places = {f"{prefix}.{name}": "disk" if name == layers else "cpu" for name, _ in decoder.named_children()}
    places |= {name: "cpu" for name, child in meta.named_children() if child is not decoder}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=scratch).eval()


class Measurement:
    """Runs functions without cached pages, and notes the bytes that were read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self.read_bytes: list[int] = []

    def seconds_of(self, act: Callable[[], Any]) -> float:
        drop_cached_pages(self._folder)
        before, began = psutil.Process().io_counters().read_bytes, time.perf_counter()
        act()
        seconds = time.perf_counter() - began
        self.read_bytes.append(psutil.Process().io_counters().read_bytes - before)
        return seconds

    def result(self) -> dict[str, Any]:
        return {"weight_bytes": self._weight_bytes, "read_bytes": statistics.median(self.read_bytes)}


@torch.no_grad()
def decode(model: Any, context: int, num_steps: int, measurement: Measurement) -> float:
    """Decoding steps per second after a prompt of `context` tokens; the median."""
    prompt = torch.randint(3, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    seen = model(prompt, use_cache=True, logits_to_keep=1)

    def step() -> None:
        nonlocal seen
        token = seen.logits[:, -1:].argmax(-1)
        seen = model(token, past_key_values=seen.past_key_values, use_cache=True)

    return 1 / statistics.median(measurement.seconds_of(step) for _ in range(num_steps))


@torch.no_grad()
def forward(model: Any, batch_size: int, measurement: Measurement) -> float:
    """Tokens per second of one pass of a batch through the blocks, without a cache."""
    hidden = torch.randn(batch_size, FORWARD_TOKENS, model.config.hidden_size, dtype=model.dtype)
    seconds = measurement.seconds_of(lambda: model.get_decoder()(inputs_embeds=hidden, use_cache=False))
    return batch_size * FORWARD_TOKENS / seconds


def measure(folder: Path, contexts: Sequence[int], num_steps: int, batch_sizes: Sequence[int]) -> dict[str, Any]:
    measurement = Measurement(folder)
    with tempfile.TemporaryDirectory() as scratch:
        model = open_model(folder, scratch)
        return {
            "steps_per_second": {str(each): decode(model, each, num_steps, measurement) for each in contexts},
            "forward_tokens_per_second": {str(each): forward(model, each, measurement) for each in batch_sizes},
            **measurement.result(),
        }


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    result = measure(arguments.model or reference_model(), arguments.contexts, arguments.steps, arguments.batches)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{describe_machine()}\n")
    print(f"{result['read_bytes'] / 1e9:.2f} GB read per step, of {result['weight_bytes'] / 1e9:.2f} GB of weights")
    for context, speed in result["steps_per_second"].items():
        print(f"context {context}: {speed:.3g} steps/s")
    for batch_size, speed in result["forward_tokens_per_second"].items():
        print(f"forward {batch_size}x{FORWARD_TOKENS}: {speed:.3g} tokens/s")


if __name__ == "__main__":
    main()
