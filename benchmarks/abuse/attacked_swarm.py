"""The servers of a swarm as an attacker sees them: their addresses, identities to reach them, raw frames to send."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from benchmarks.abuse.raw_frames import Raw
from shoal.errors import SwarmError
from shoal.net import NetworkConfig, join
from shoal.net.transport import Node, Stream
from shoal.peers import ModelInfo, ServerInfo

ATTACKERS_HOST = "127.0.1.1"
"""Attackers come from an address of their own. The servers and the honest client are at 127.0.0.1."""
HIDDEN_SIZE = 192
"""Of the bundled model."""


class AttackedSwarm:
    """A swarm that is attacked from this process. Enter it; its identities leave the network when it is left."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.model: ModelInfo
        self.servers: tuple[ServerInfo, ...] = ()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> AttackedSwarm:
        await self._stack.__aenter__()
        directory = (await self.identity(client_mode=True)).directory
        (self.model,) = await directory.models()
        while len(self.servers) < len(self.addresses):
            self.servers = await directory.servers(self.model)
        self.servers = tuple(sorted(self.servers, key=lambda server: server.span.start))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def identity(self, *, host: str = ATTACKERS_HOST, client_mode: bool = False) -> Node:
        """A new identity in the swarm, seen at `host` unless it is in client mode: 127.0.0.1 then."""
        config = NetworkConfig(self.addresses, host=host, client_mode=client_mode, serve_relay=False)
        return await self._stack.enter_async_context(join(config))

    async def identities(self, number: int, *, host: str = ATTACKERS_HOST) -> list[Node]:
        """New identities, all at one host. A busy machine may start fewer of them."""
        found: list[Node] = []
        for _ in range(number):
            with contextlib.suppress(SwarmError):
                found.append(await self.identity(host=host))
        return found

    async def open(self, attacker: Node, server: ServerInfo) -> Stream:
        """A stream to a server. Raises `StreamBroken`."""
        return await attacker.transport.open(server.peer, server.addresses)

    def on_span(self, server: ServerInfo) -> dict[str, Any]:
        """The fields by which a request names a server's blocks and weights."""
        span = {"start": server.span.start, "end": server.span.end}
        return {"model": self.model.key, "fingerprint": server.fingerprint, **span}

    @staticmethod
    async def send(stream: Stream, *frames: Raw) -> None:
        """Send frames. Raises `StreamBroken`."""
        for frame in frames:
            await stream.send(frame.header, [frame.payload])

    @staticmethod
    def begun() -> None:
        """Tell that the attack is in full swing."""
        print("begun", flush=True)

    @staticmethod
    async def hold() -> None:
        """Wait until this process is killed."""
        await asyncio.Event().wait()
