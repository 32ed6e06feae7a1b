"""TCP proxies that delay, throttle, hold back and break what passes: a door in front of each peer.

A peer announces its door's address, so whoever dials the peer passes its door. A connection passes one link, that of
the peer that was dialled; but it is held or broken with either of its peers. libp2p dials from the port on which it
listens, which tells whose connection comes in at another's door.

This is a process of its own (`shoal.testing.network` starts it), because its timers must not wait for anybody's Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import socket
import sys
from collections.abc import Callable
from typing import Any

from shoal.testing.end import ProxySocket
from shoal.testing.link import Link, LinkDirection
from shoal.testing.reach import HOST, ProxyCommand

PRIORITY = -10
BACKLOG = 1024

Greet = Callable[[ProxySocket, "Proxy", int], None]
"""Called with somebody's end, the door that he has come to, and the port that he has dialled from."""


class Proxies:
    """All the doors, by the ports of the peers behind them."""

    def __init__(self) -> None:
        self._proxies: dict[int, Proxy] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, peer_port: int, inward: Link, outward: Link) -> int:
        """Make a door for the peer that listens on this port; returns the port to announce."""
        proxy = self._proxies[peer_port] = Proxy(peer_port, inward, outward, self._greet, seed=2 * len(self._proxies))
        await proxy.set_reach(ProxyCommand.OPEN)
        return proxy.port

    def __getitem__(self, peer_port: int) -> Proxy:
        return self._proxies[peer_port]

    def _greet(self, near: ProxySocket, proxy: Proxy, dialled_from: int) -> None:
        """Somebody has come to a door."""
        proxies = [proxy, *filter(None, [self._proxies.get(dialled_from)])]
        task = asyncio.create_task(Connection(near, proxy, proxies).run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Proxy:
    """Where a peer is reached: its link, whether anything passes, and the connections that it has."""

    def __init__(self, peer_port: int, inward: Link, outward: Link, greet: Greet, *, seed: int) -> None:
        self.peer_port = peer_port
        self.inward, self.outward = LinkDirection(inward, seed=seed), LinkDirection(outward, seed=seed + 1)
        self.reach = ProxyCommand.OPEN
        self.connections: set[Connection] = set()
        self.num_connections = 0
        self._reserved = _bind(0)  # so that nobody else gets the port while nobody listens there
        self.port: int = self._reserved.getsockname()[1]
        self._greet = greet
        self._server: asyncio.Server | None = None

    def change_link(self, inward: Link, outward: Link) -> None:
        self.inward.change(inward)
        self.outward.change(outward)
        for connection in self.connections:
            connection.near.have_room()
            connection.far.have_room()

    async def set_reach(self, reach: ProxyCommand) -> None:
        self.reach = reach
        if reach is ProxyCommand.CUT and self._server is not None:
            self._server.close()
            self._server = None
        elif reach is not ProxyCommand.CUT and self._server is None:
            loop, listening = asyncio.get_running_loop(), _bind(self.port)
            self._server = await loop.create_server(lambda: _Near(self, self._greet), sock=listening, backlog=BACKLOG)
        for connection in [*self.connections]:
            connection.update()


class Connection:
    """Two sockets: `near` came to the door, `far` is ours to the peer behind it."""

    def __init__(self, near: ProxySocket, proxy: Proxy, proxies: list[Proxy]) -> None:
        self.near, self.far = near, ProxySocket(proxy.outward)
        self._proxy = proxy
        self._proxies = proxies
        self._flows = asyncio.Event()

    async def run(self) -> None:
        """Until it has ended."""
        self._proxy.num_connections += 1
        for proxy in self._proxies:
            proxy.connections.add(self)
        try:
            self.update()
            # A handshake goes there and back before anything that is said.
            await asyncio.sleep(self._proxy.inward.link.delay_seconds + self._proxy.outward.link.delay_seconds)
            await self._flows.wait()
            if not self.near.is_closing:
                with contextlib.suppress(OSError):
                    await asyncio.get_running_loop().create_connection(lambda: self.far, HOST, self._proxy.peer_port)
            if not self.far.is_connected:
                self.near.reset()
            elif self.near.is_closing:  # cut off, and healed meanwhile
                self.far.reset()
            self.near.join(self.far)
            self.far.join(self.near)
            self.update()
            await self.near.lost.wait()
            if self.far.is_connected:
                await self.far.lost.wait()
        finally:
            for proxy in self._proxies:
                proxy.connections.discard(self)

    def update(self) -> None:
        """Do what the doors say now."""
        reaches = {proxy.reach for proxy in self._proxies}
        flows = reaches == {ProxyCommand.OPEN}
        (self._flows.set if flows or ProxyCommand.CUT in reaches else self._flows.clear)()
        for end in (self.near, self.far):
            if ProxyCommand.CUT in reaches:
                end.reset()
            end.hold(not flows)


class _Near(ProxySocket):
    """The end of somebody who has come to a door."""

    def __init__(self, proxy: Proxy, greet: Greet) -> None:
        super().__init__(proxy.inward)
        self._proxy = proxy
        self._greet = greet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._greet(self, self._proxy, transport.get_extra_info("peername")[1])


def _bind(port: int) -> socket.socket:
    bound = socket.socket()
    # For us to bind it twice: once to keep it, once to listen.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((HOST, port))
    return bound


async def obey(proxies: Proxies, order: dict[str, Any]) -> dict[str, Any]:
    """Do what one line says; returns the answer."""
    peer_port: int = order["peer_port"]
    match order["do"]:
        case "open":
            port = await proxies.open(peer_port, Link.from_json(order["inward"]), Link.from_json(order["outward"]))
            return {"port": port}
        case "link":
            proxies[peer_port].change_link(Link.from_json(order["inward"]), Link.from_json(order["outward"]))
            return {}
        case "reach":
            await proxies[peer_port].set_reach(ProxyCommand(order["reach"]))
            return {}
        case "count":
            proxy = proxies[peer_port]
            return {
                "connections": proxy.num_connections,
                "inward": proxy.inward.num_bytes,
                "outward": proxy.outward.num_bytes,
            }
    raise ValueError(f"an order that nobody knows: {order}")


async def main() -> None:
    """Obey the lines that come in, until they end."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    proxies = Proxies()
    while line := await lines.readline():
        print(json.dumps(await obey(proxies, json.loads(line))), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    # The only selector whose timeouts are finer than a millisecond; it knows up to some five hundred connections.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())
