"""A server that fails at random: it serves like `shoal serve`, and sometimes loses all of its state.

    python -m benchmarks.failures.failing_server MODEL --blocks 0:4 [--initial-peers ADDRESS] [--threads 1]

Before each step of a session, and before each forward pass, it draws a random number. With the given probability it
fails: it forgets all sessions and all cached prefixes, closes all of its streams, and goes on serving. It prints its
address to stdout, then reads lines such as `{"rate": 0.01, "seed": 1}` from stdin. For each line it forgets everything,
sets the rate, and prints how often it has failed since the line before. It ends when stdin ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers

from shoal.host.processes import interruptible
from shoal.net import NetworkConfig, join
from shoal.net.transport import Stream, StreamBroken, StreamHandler, Transport
from shoal.policy.network.reachability import Reach
from shoal.server.config import ServerConfig
from shoal.server.engine.engine import Engine
from shoal.server.server import serve
from shoal.spans import Span


class BreakableTransport:
    """A transport that can close all of its streams together, those that it opened and those that it accepted."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    @property
    def peer(self) -> str:
        return self._transport.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses

    @property
    def reach(self) -> Reach:
        return self._transport.reach

    async def reach_other_than(self, last: Reach) -> Reach:
        return await self._transport.reach_other_than(last)

    def sign(self, data: bytes) -> bytes:
        return self._transport.sign(data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        return self._transport.verify(peer, data, signature)

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> Stream:
        stream = await self._transport.open(peer, addresses)
        self._streams.add(stream)
        return stream

    async def listen(self, handler: StreamHandler) -> None:
        async def handle(stream: Stream) -> None:
            self._streams.add(stream)
            await handler(stream)

        await self._transport.listen(handle)

    async def close(self) -> None:
        await self._transport.close()

    async def break_all(self) -> None:
        await asyncio.gather(*(stream.close() for stream in list(self._streams)))
        self._streams.clear()


class Amnesia:
    """Makes an engine fail at random before a computation."""

    def __init__(self, engine: Any, transport: BreakableTransport) -> None:
        self.rate = 0.0
        self.chance = random.Random()
        self.num_failures = 0
        self._engine: Engine = engine
        self._transport = transport
        engine.step, engine.passes.forward = self._drawing(engine.step), self._drawing(engine.passes.forward)

    def _drawing(self, compute: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def draw(*args: Any, **options: Any) -> Any:
            if self.chance.random() < self.rate:
                self.num_failures += 1
                await self._transport.break_all()
                self._engine.forget()
                raise StreamBroken("the server has lost its state")
            return await compute(*args, **options)

        return draw

    def obey(self, command: dict[str, Any]) -> int:
        """Forget everything and set the rate. Returns the number of failures since the last command."""
        num_failures, self.num_failures = self.num_failures, 0
        self.rate = float(command["rate"])
        self.chance.seed(f"{command['seed']} {self._transport.peer}")
        self._engine.forget()
        return num_failures


async def run(config: ServerConfig, peers: Sequence[str]) -> None:
    network = NetworkConfig(initial_peers=tuple(peers), host="127.0.0.1")
    async with join(network) as node:
        breakable = BreakableTransport(node.transport)
        transport: Transport = breakable  # `replace` does not check it
        async with serve(config, replace(node, transport=transport)) as server:
            amnesia = Amnesia(server.engine, breakable)
            say({"peer": server.info.peer, "address": server.info.addresses[0]})
            while line := await asyncio.to_thread(sys.stdin.readline):
                say({"failures": amnesia.obey(json.loads(line))})


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=Span.parse, required=True)
    parser.add_argument("--initial-peers", nargs="*", default=[], metavar="ADDRESS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # of the event loop's thread; the compute thread has its own
    config = ServerConfig(
        model=arguments.model,
        blocks=arguments.blocks,
        num_threads=arguments.threads,
        dtype=arguments.dtype,
        cache_tokens=arguments.cache_tokens,
    )
    asyncio.run(run(config, arguments.initial_peers))


if __name__ == "__main__":
    main()
