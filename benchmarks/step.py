"""The parts of a decoding step's time, compared with the time to read its weights from memory.

    python -m benchmarks.step [--sessions 1 8] [--past 128] [--blocks 8] [--quantization none] [--json]

A span of the reference model computes steps as a server does, but in this process and without a network. The profiler's
times are grouped by the purpose of the operators; the rest of a step's time is Python and dispatch. The limit is the
bytes of the span's weights divided by the memory bandwidth, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from shoal.host.processes import interruptible
from shoal.model.linear.quantization import Quantization
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.kv.batch import Chunk, PackedPass
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.pages import pages_for
from shoal.server.kv.session_cache import Growth
from shoal.spans import Span

REPEATS = 15
KINDS = {
    "matrix products": ("linear", "addmm", "aten::mm", "aten::bmm", "bitsandbytes::", "int8_"),
    "attention": ("scaled_dot_product",),
    "cache reads and writes": ("aten::index", "_index_put"),
}
ELSE = "norms, activations, positions"


def seconds_of(act: Callable[[], Any]) -> float:
    """Median seconds of several runs, after two warm-up runs."""
    seconds = []
    for index in range(REPEATS + 2):
        began = time.perf_counter()
        act()
        if index >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def read_bandwidth() -> float:
    """Memory bandwidth of all threads together, in bytes per second."""
    numbers = torch.ones(1 << 28)
    return numbers.nbytes / seconds_of(numbers.sum)


def chunks_of(num_sessions: int, past: int, span: Span, hidden_size: int) -> list[Chunk]:
    pages = pages_for(past + 1)
    return [
        Chunk(
            span=span,
            hidden_BTD=torch.randn(1, 1, hidden_size).bfloat16(),
            positions_BT=None,
            mask_BS=None,
            num_computed_tokens=past,
            pages=(own_pages := tuple(range(index * pages, (index + 1) * pages)),),
            growth=Growth((), own_pages),
        )
        for index in range(num_sessions)
    ]


def profile_of(act: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Seconds of a step by purpose."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(REPEATS):
            act()
    parts = dict.fromkeys([*KINDS, ELSE], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), ELSE)
        parts[kind] += event.self_cpu_time_total / REPEATS / 1e6
    parts["Python and dispatch"] = max(0.0, seconds - sum(parts.values()))
    return parts


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--quantization", type=Quantization, default=Quantization.NONE)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    checkpoint, span = Checkpoint.open(reference_model()), Span(0, arguments.blocks)
    weight_bytes = sum(checkpoint.block_bytes[: arguments.blocks])
    weight_bytes = round(weight_bytes * arguments.quantization.weight_bytes(torch.bfloat16) / torch.bfloat16.itemsize)
    body = load_body(checkpoint, span, dtype=torch.bfloat16, quantization=arguments.quantization)
    num_pages = max(arguments.sessions) * pages_for(arguments.past + 1)
    compute = PackedPass(body, PagedCache(body, cache_shapes(body), num_pages))
    bandwidth = read_bandwidth()
    steps = []
    for num_sessions in arguments.sessions:
        chunks = chunks_of(num_sessions, arguments.past, span, body.backbone.config.hidden_size)
        seconds = seconds_of(lambda chunks=chunks: compute(chunks))
        parts = profile_of(lambda chunks=chunks: compute(chunks), seconds)
        steps.append({"sessions": num_sessions, "seconds": seconds, "parts": parts})
    result = {
        "machine": describe_machine(),
        "blocks": arguments.blocks,
        "past": arguments.past,
        "quantization": arguments.quantization.value,
        "weight_bytes": weight_bytes,
        "read_bytes_per_second": bandwidth,
        "limit_seconds": weight_bytes / bandwidth,
        "steps": steps,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['machine']}\n")
    print(
        f"{arguments.blocks} blocks, {weight_bytes / 1e9:.2f} GB; memory bandwidth {bandwidth / 1e9:.0f} GB/s:",
        end=" ",
    )
    print(f"a step takes at least {1e3 * weight_bytes / bandwidth:.1f} ms\n")
    names = list(steps[0]["parts"])
    print("| sessions | step, ms | multiple of the limit | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    for step in steps:
        parts = " | ".join(f"{1e3 * step['parts'][name]:.1f}" for name in names)
        ratio = step["seconds"] * bandwidth / weight_bytes
        print(f"| {step['sessions']} | {1e3 * step['seconds']:.1f} | {ratio:.1f} | {parts} |")


if __name__ == "__main__":
    main()
