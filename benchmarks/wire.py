"""The cost of a hop without its computation: hidden states to a server and back over libp2p, in each encoding.

    python -m benchmarks.wire [--rounds 200] [--json]

The server is another process on loopback. It decodes each message and sends the tensor back without computing. The
sizes in the table are those of bfloat16, before encoding. The encodings take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.machine import describe_machine
from shoal.net import NetworkConfig, join
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.net.wire.encodings import as_received
from shoal.protocol import Step, StepResult
from shoal.tensors import Encoding

HIDDEN_SIZE = 2048
SIZES = {"16 KiB": 4, "1 MiB": 256}  # tokens of 4 KiB
CASES: list[tuple[torch.dtype, Encoding]] = [
    (torch.bfloat16, "raw"),
    (torch.bfloat16, "int8"),
    (torch.float32, "raw"),
    (torch.float32, "bfloat16"),
    (torch.float32, "int8"),
]


async def echo(stream: Stream) -> None:
    while True:
        message, tensors = await codec.receive(stream)
        await codec.send(stream, StepResult(), {"hidden": tensors["hidden"]}, message.encoding_of("hidden"))


async def serve() -> None:
    """Echo messages until stdin ends."""
    async with join(NetworkConfig(host="127.0.0.1")) as node:
        await node.transport.listen(echo)
        print(node.transport.addresses[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def ask(stream: Stream, hidden: torch.Tensor, encoding: Encoding) -> float:
    """Seconds until the answer is decoded. The answer is checked."""
    start = time.perf_counter()
    await codec.send(stream, Step(position=0), {"hidden": hidden}, encoding)
    _, answer = await codec.receive(stream)
    seconds = time.perf_counter() - start
    if not torch.equal(answer["hidden"], as_received(hidden, encoding)):
        raise SystemExit("the answer differs from the tensor that was sent")
    return seconds


async def measure(address: str, rounds: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    load = os.getloadavg()[2]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.wire", "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        results = asyncio.run(measure(server.stdout.readline().strip(), arguments.rounds))
        server.stdin.close()
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "load_before": load, "hops": results}, indent=2))
        return
    print(f"{describe_machine()}\n")
    print("hidden states  dtype     encoding  bytes each way  median ms  95 % ms")
    for each in results:
        print(
            f"{each['hidden_states']:<13}  {each['dtype']:<8}  {each['encoding']:<8}  {each['bytes_each_way']:>14,}"
            f"  {each['median_ms']:>9.2f}  {each['p95_ms']:>7.2f}"
        )


if __name__ == "__main__":
    main()
