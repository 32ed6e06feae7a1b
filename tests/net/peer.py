"""A peer in a process of its own, which tests kill. It echoes frames, and sends `goodbye` on SIGINT."""

from __future__ import annotations

import asyncio
import signal
import sys

from shoal.net import NetworkConfig, join
from shoal.net.transport import Stream


async def main(initial_peers: tuple[str, ...]) -> None:
    streams: set[Stream] = set()
    interrupted = asyncio.Event()

    async def echo(stream: Stream) -> None:
        streams.add(stream)
        try:
            while True:
                header, payload = await stream.receive()
                await stream.send(header, [payload])
        finally:
            streams.discard(stream)

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    async with join(NetworkConfig(initial_peers=initial_peers, host="127.0.0.1")) as node:
        await node.transport.listen(echo)
        print(node.transport.addresses[0], flush=True)
        await interrupted.wait()
        for stream in [*streams]:
            await stream.send(b"goodbye")


if __name__ == "__main__":
    asyncio.run(main(tuple(sys.argv[1:])))
