"""The cost of a hop without its computation: hidden states to a server and back over libp2p, in each encoding.

    python -m benchmarks.wire [--rounds 200] [--json]
    python -m benchmarks.wire --lines [--rounds 20] [--model FOLDER] [--json]

The server is another process on loopback. It decodes each message and sends the tensor back without computing. The
sizes in the table are those of bfloat16, before encoding. The encodings take turns.

With `--lines`, a proxy shapes the server's link (docs/testing.md), and two clients take turns: one whose tensors are
packed without loss where that is faster, as with `wire="auto"`, and one that never packs. They send hidden states of a
model (the bundled one), of as many tokens as a prefill has. Bytes are those that the proxy forwarded, both ways.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.machine import describe_machine
from shoal.bundled import STORIES
from shoal.host.processes import interruptible
from shoal.net import NetworkConfig, join
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.net.wire.encodings import as_received
from shoal.protocol import Step, StepResult
from shoal.tensors import Encoding
from shoal.testing import Link
from shoal.testing.proxy_process import ProxyProcess

HIDDEN_SIZE = 2048
SIZES = {"16 KiB": 4, "1 MiB": 256}  # tokens of 4 KiB
CASES: list[tuple[torch.dtype, Encoding]] = [
    (torch.bfloat16, "raw"),
    (torch.bfloat16, "int8"),
    (torch.float32, "raw"),
    (torch.float32, "bfloat16"),
    (torch.float32, "int8"),
]

LINE_TOKENS = (1024, 128, 16, 1)
LINES = {
    "loopback": Link(),
    "1 Gbit/s, 4 ms": Link(delay_seconds=0.002, bytes_per_second=1e9 / 8),
    "100 Mbit/s, 4 ms": Link(delay_seconds=0.002, bytes_per_second=100e6 / 8),
    "100 Mbit/s, 100 ms": Link(delay_seconds=0.05, bytes_per_second=100e6 / 8),
    "10 Mbit/s, 100 ms": Link(delay_seconds=0.05, bytes_per_second=10e6 / 8),
}
WARM_UP = 9
"""Rounds on a line before the first that counts: its goodput follows from the last eight large messages."""


async def echo(stream: Stream) -> None:
    while True:
        message, tensors = await codec.receive(stream)
        await codec.send(stream, StepResult(), {"hidden": tensors["hidden"]}, message.encoding_of("hidden"))


async def serve(port: int, announce: tuple[str, ...]) -> None:
    """Echo messages until stdin ends."""
    async with join(NetworkConfig(host="127.0.0.1", port=port, announce=announce)) as node:
        await node.transport.listen(echo)
        print(node.transport.addresses[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def ask(stream: Stream, hidden: torch.Tensor, encoding: Encoding, *, packs: bool = False) -> float:
    """Seconds until the answer is decoded. The answer is checked."""
    start = time.perf_counter()
    await codec.send(stream, Step(position=0), {"hidden": hidden}, encoding, packs=packs)
    _, answer = await codec.receive(stream)
    seconds = time.perf_counter() - start
    if not torch.equal(answer["hidden"], as_received(hidden, encoding)):
        raise SystemExit("the answer differs from the tensor that was sent")
    return seconds


async def measure(address: str, rounds: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    async with join(NetworkConfig(initial_peers=(address,), client_mode=True)) as node:
        stream = await node.transport.open(address.rpartition("/")[2], [address])
        for size, num_tokens in SIZES.items():
            inputs = torch.randn(1, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
            seconds: list[list[float]] = [[] for _ in CASES]
            for index in range(rounds + rounds // 10):
                for (dtype, encoding), found in zip(CASES, seconds, strict=True):
                    taken = await ask(stream, inputs.to(dtype), encoding)
                    if index >= rounds // 10:  # the rounds before warm up
                        found.append(taken)
            for (dtype, encoding), found in zip(CASES, seconds, strict=True):
                _, buffers = codec.encode(Step(position=0), {"hidden": inputs.to(dtype)}, encoding)
                results.append(
                    {
                        "hidden_states": size,
                        "dtype": str(dtype).removeprefix("torch."),
                        "encoding": encoding,
                        "bytes_each_way": sum(len(buffer) for buffer in buffers),
                        "median_ms": statistics.median(found) * 1e3,
                        "p95_ms": statistics.quantiles(found, n=20)[-1] * 1e3,
                    }
                )
        await stream.close()
    return results


def hidden_states(folder: Path) -> torch.Tensor:
    """What the middle block of a model gives for random tokens, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    num_tokens = min(max(LINE_TOKENS), model.config.max_position_embeddings)
    ids = torch.randint(3, model.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = model(ids, output_hidden_states=True).hidden_states
    middle: torch.Tensor = layers[len(layers) // 2]
    return middle.repeat(1, -(-max(LINE_TOKENS) // num_tokens), 1)[:, : max(LINE_TOKENS)]


async def measure_lines(
    address: str, port: int, proxies: ProxyProcess, hidden: torch.Tensor, rounds: int
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        streams = {}
        for packs in (True, False):
            node = await stack.enter_async_context(join(NetworkConfig(initial_peers=(address,), client_mode=True)))
            streams[packs] = await node.transport.open(address.rpartition("/")[2], [address])
            stack.push_async_callback(streams[packs].close)
        for name, link in LINES.items():
            proxies.set_link(port, link, link)
            for num_tokens in LINE_TOKENS:
                found: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
                warm_up = WARM_UP if num_tokens == max(LINE_TOKENS) else 1
                for index in range(warm_up + rounds):
                    for packs in (index % 2 > 0, index % 2 == 0):
                        before = proxies.traffic(port)
                        seconds = await ask(streams[packs], hidden[:, :num_tokens], "raw", packs=packs)
                        after = proxies.traffic(port)
                        num_bytes = (
                            after.inward_bytes + after.outward_bytes - before.inward_bytes - before.outward_bytes
                        )
                        if index >= warm_up:
                            found[packs].append((seconds, num_bytes))
                seconds, num_bytes = (
                    {packs: statistics.median(each[column] for each in found[packs]) for packs in found}
                    for column in (0, 1)
                )
                results.append(
                    {
                        "line": name,
                        "tokens": num_tokens,
                        "raw_ms": seconds[False] * 1e3,
                        "auto_ms": seconds[True] * 1e3,
                        "raw_bytes": num_bytes[False],
                        "auto_bytes": num_bytes[True],
                    }
                )
    return results


@contextmanager
def echo_server(*options: str) -> Iterator[str]:
    """The address of an echo server in another process."""
    command = [sys.executable, "-m", "benchmarks.wire", "--serve", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.stdin.close()


def run_lines(model: Path, rounds: int) -> list[dict[str, Any]]:
    hidden = hidden_states(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProxyProcess() as proxies:
        proxy_port = proxies.open_proxy(port, Link(), Link())
        with echo_server("--port", str(port), "--announce", f"/ip4/127.0.0.1/tcp/{proxy_port}") as address:
            return asyncio.run(measure_lines(address, port, proxies, hidden, rounds))


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--announce", nargs="*", default=(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.port, tuple(arguments.announce)))
        return
    load = os.getloadavg()[2]
    if arguments.lines:
        results = run_lines(arguments.model, arguments.rounds or 20)
    else:
        with echo_server() as address:
            results = asyncio.run(measure(address, arguments.rounds or 200))
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "load_before": load, "hops": results}, indent=2))
        return
    print(f"{describe_machine()}; load before {load:.1f}\n")
    if arguments.lines:
        print("| line | tokens | raw, ms | auto, ms | ratio | raw, kB | auto, kB | ratio |\n" + "|---" * 8 + "|")
        for each in results:
            ms, num_bytes = each["auto_ms"] / each["raw_ms"], each["auto_bytes"] / each["raw_bytes"]
            print(
                f"| {each['line']} | {each['tokens']} | {each['raw_ms']:.4g} | {each['auto_ms']:.4g} | **{ms:.2f}** "
                f"| {each['raw_bytes'] / 1e3:.4g} | {each['auto_bytes'] / 1e3:.4g} | **{num_bytes:.2f}** |"
            )
        return
    print("hidden states  dtype     encoding  bytes each way  median ms  95 % ms")
    for each in results:
        print(
            f"{each['hidden_states']:<13}  {each['dtype']:<8}  {each['encoding']:<8}  {each['bytes_each_way']:>14,}"
            f"  {each['median_ms']:>9.2f}  {each['p95_ms']:>7.2f}"
        )


if __name__ == "__main__":
    main()
