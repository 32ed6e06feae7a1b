"""The cost of a client's history, from which servers are replaced: bytes and time for each token and hop.

    python -m benchmarks.memory.history [--tokens 4096] [--json]

Hidden states as wide as the reference model's are appended one by one to the history of one hop, as decoding does.
"limited" keeps a tenth in memory and the rest in a file. "process" is the growth of the whole process. Each setting has
a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import torch

from benchmarks.common.machine import describe_machine
from shoal.client.history.history import History
from shoal.client.history.history_store import HistoryStore
from shoal.host.processes import interruptible
from shoal.net.wire.encodings import as_received
from shoal.tensors import Encoding

HIDDEN_SIZE = 2048
SETTINGS: dict[str, tuple[torch.dtype, Encoding, bool]] = {
    "bfloat16: exact": (torch.bfloat16, "raw", False),
    "bfloat16: exact, limited": (torch.bfloat16, "raw", True),
    "bfloat16: int8": (torch.bfloat16, "int8", False),
    "bfloat16: int8, limited": (torch.bfloat16, "int8", True),
    "float32: exact": (torch.float32, "raw", False),
    "float32: bfloat16": (torch.float32, "bfloat16", False),
    "float32: int8": (torch.float32, "int8", False),
}


def tokens(dtype: torch.dtype, count: int) -> Iterator[torch.Tensor]:
    """Hidden states, [1, 1, D], each in memory of its own, as they arrive from a network."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 1, HIDDEN_SIZE, generator=generator).to(dtype) for _ in range(count))


def measure(setting: str, count: int) -> dict[str, object]:
    dtype, encoding, limited = SETTINGS[setting]
    total_bytes = count * HIDDEN_SIZE * dtype.itemsize
    store = HistoryStore(encoding, memory_bytes=total_bytes // 10 if limited else None)
    warm = History(HistoryStore(encoding))
    for token in tokens(dtype, 200):
        warm.append(token)
        warm.settle(warm.num_tokens)
    warm.since(0)
    process = psutil.Process()
    before = process.memory_info().rss
    history, seconds = History(store), list[float]()
    for token in tokens(dtype, count):
        start = time.perf_counter()
        history.append(token)
        history.settle(history.num_tokens)
        seconds.append(time.perf_counter() - start)
    grown = process.memory_info().rss - before
    start = time.perf_counter()
    stored = history.since(0)
    read_seconds = time.perf_counter() - start
    expected = torch.cat(list(tokens(dtype, count)), dim=1)
    settled = count // 64 * 64
    if not torch.equal(stored[:, :settled], as_received(expected[:, :settled], encoding)):
        raise SystemExit("the stored states differ from those that were appended")
    return {
        "setting": setting,
        "memory_bytes_per_token": store.memory_bytes / count,
        "file_bytes_per_token": store.file_bytes / count,
        "process_bytes_per_token": grown / count,
        "append_us": statistics.mean(seconds) * 1e6,
        "append_worst_us": max(seconds) * 1e6,
        "read_ms_per_1024": read_seconds / count * 1024 * 1e3,
    }


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setting:
        print(json.dumps(measure(arguments.setting, arguments.tokens)))
        return
    results = []
    for setting in SETTINGS:
        options = ["--setting", setting, "--tokens", str(arguments.tokens)]
        command = [sys.executable, "-m", "benchmarks.memory.history", *options]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "histories": results}, indent=2))
        return
    print(f"{describe_machine()}\n{arguments.tokens:,} tokens of {HIDDEN_SIZE}, one hop\n")
    print("setting                    in memory  in the file  process   append µs  (worst)  read back, ms per 1,024")
    for each in results:
        print(
            f"{each['setting']:<25}  {each['memory_bytes_per_token']:>9,.0f}  {each['file_bytes_per_token']:>11,.0f}"
            f"  {each['process_bytes_per_token']:>7,.0f}  {each['append_us']:>9.1f}  {each['append_worst_us']:>8.0f}"
            f"  {each['read_ms_per_1024']:>10.2f}"
        )


if __name__ == "__main__":
    main()
