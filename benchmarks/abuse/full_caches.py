"""The process that fills the caches of servers once: `python -m benchmarks.abuse.full_caches ADDRESS ...`.

The system provides the memory of a cache when it is written. That is no growth over what a server was told to use, so
it is done before memory is measured. It prints `full` at the end.
"""

from __future__ import annotations

import asyncio
import sys

import torch

from benchmarks.abuse.attacked_swarm import HIDDEN_SIZE, AttackedSwarm
from benchmarks.abuse.raw_frames import raw
from shoal.cli.service.long_running import end_with_parent
from shoal.net.transport import Node, Stream
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import StepResult

CACHE_TOKENS = 16384
"""The cache of each server: enough for some clients, and filled in seconds."""
LENGTH = 1024
"""Tokens of a session: the most that the bundled model has room for."""


async def full_session(swarm: AttackedSwarm, client: Node, server: ServerInfo) -> Stream:
    """A session of `LENGTH` tokens, which has been computed."""
    stream = await swarm.open(client, server)
    hidden = torch.randn(1, LENGTH, HIDDEN_SIZE)
    opening = raw("open", **swarm.on_span(server), batch_size=1, expected_length=LENGTH)
    await swarm.send(stream, opening, raw("step", {"hidden": hidden}, position=0))
    while not isinstance((await codec.receive(stream))[0], StepResult):
        pass
    return stream


async def fill(addresses: tuple[str, ...]) -> None:
    async with AttackedSwarm(addresses) as swarm:
        (client,) = await swarm.identities(1)
        for server in swarm.servers:
            streams = [await full_session(swarm, client, server) for _ in range(CACHE_TOKENS // LENGTH)]
            for stream in streams:
                await stream.close()
    print("full", flush=True)


def main() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    asyncio.run(fill(tuple(sys.argv[1:])))


if __name__ == "__main__":
    main()
