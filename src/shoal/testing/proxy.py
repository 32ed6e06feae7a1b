"""TCP proxies that delay, throttle, hold back and break connections: one proxy in front of each peer.

A peer announces its proxy's address, so other peers dial the proxy. A connection takes the link of the peer that was
dialled, but the state of either of its two peers holds it back or breaks it. libp2p dials from the port on which it
listens, so the source port of a connection names the peer that dialled.

The proxies run in a process of their own, which `shoal.testing.proxy_process` starts: their timers must not wait for
another program's Python code. Each line of stdin is a command in JSON, each line of stdout its answer.
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

from shoal.testing.link import Link, LinkDirection
from shoal.testing.proxy_socket import ProxySocket
from shoal.testing.proxy_state import HOST, ProxyState

PRIORITY = -10
"""The process's niceness, where the system permits it: the busy servers beside it must not delay its timers."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""

OnAccept = Callable[[ProxySocket, "Proxy", int], None]
"""Called with the socket that a proxy accepted, the proxy, and the port that the connection was dialled from."""


class Proxies:
    """All proxies, by the ports of the peers behind them. `tasks` owns their connections."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._proxies: dict[int, Proxy] = {}
        self._tasks = tasks

    async def open(self, peer_port: int, inward: Link, outward: Link) -> int:
        """Open a proxy for the peer that listens on this port. Returns the port to announce."""
        proxy = self._proxies[peer_port] = Proxy(peer_port, inward, outward, self._accept, seed=2 * len(self._proxies))
        await proxy.set_state(ProxyState.OPEN)
        return proxy.port

    def __getitem__(self, peer_port: int) -> Proxy:
        return self._proxies[peer_port]

    def _accept(self, near: ProxySocket, proxy: Proxy, source_port: int) -> None:
        proxies = [proxy, *filter(None, [self._proxies.get(source_port)])]
        self._tasks.create_task(Connection(near, proxy, proxies).run())


class Proxy:
    """Where a peer is reached: its link, its state, and its connections."""

    def __init__(self, peer_port: int, inward: Link, outward: Link, on_accept: OnAccept, *, seed: int) -> None:
        self.peer_port = peer_port
        self.inward, self.outward = LinkDirection(inward, seed=seed), LinkDirection(outward, seed=seed + 1)
        self.state = ProxyState.OPEN
        self.connections: set[Connection] = set()
        self.num_connections = 0
        self._reserved = _bind(0)  # keeps the port while the proxy does not listen on it
        self.port: int = self._reserved.getsockname()[1]
        self._on_accept = on_accept
        self._server: asyncio.Server | None = None

    def set_link(self, inward: Link, outward: Link) -> None:
        """Replace the link; a connection that waited for room on the old one continues."""
        self.inward.set_link(inward)
        self.outward.set_link(outward)
        for connection in self.connections:
            connection.near.on_link_free()
            connection.far.on_link_free()

    async def set_state(self, state: ProxyState) -> None:
        """Start or stop listening as `state` says, and apply it to the connections."""
        self.state = state
        if state is ProxyState.CUT and self._server is not None:
            self._server.close()
            self._server = None
        elif state is not ProxyState.CUT and self._server is None:
            loop, listening = asyncio.get_running_loop(), _bind(self.port)
            self._server = await loop.create_server(
                lambda: _AcceptedSocket(self, self._on_accept), sock=listening, backlog=BACKLOG
            )
        for connection in [*self.connections]:
            connection.update()


class Connection:
    """Two sockets: the proxy accepted `near`, and opens `far` to the peer behind it."""

    def __init__(self, near: ProxySocket, proxy: Proxy, proxies: list[Proxy]) -> None:
        self.near, self.far = near, ProxySocket(proxy.outward)
        self._proxy = proxy
        self._proxies = proxies
        self._may_dial = asyncio.Event()

    async def run(self) -> None:
        """Open `far`, join it with `near`, and return when both are closed."""
        self._proxy.num_connections += 1
        for proxy in self._proxies:
            proxy.connections.add(self)
        try:
            self.update()
            # TCP's handshake takes one round trip before any data.
            await asyncio.sleep(self._proxy.inward.link.delay_seconds + self._proxy.outward.link.delay_seconds)
            await self._may_dial.wait()
            if not self.near.is_closing:
                with contextlib.suppress(OSError):
                    await asyncio.get_running_loop().create_connection(lambda: self.far, HOST, self._proxy.peer_port)
            if not self.far.is_connected:
                self.near.reset()
            elif self.near.is_closing:  # it was cut meanwhile
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
        """Apply the states of the proxies."""
        states = {proxy.state for proxy in self._proxies}
        is_open = states == {ProxyState.OPEN}
        if is_open or ProxyState.CUT in states:
            self._may_dial.set()
        else:
            self._may_dial.clear()
        for end in (self.near, self.far):
            if ProxyState.CUT in states:
                end.reset()
            end.hold(not is_open)


class _AcceptedSocket(ProxySocket):
    """The socket of a connection that a proxy accepted."""

    def __init__(self, proxy: Proxy, on_accept: OnAccept) -> None:
        super().__init__(proxy.inward)
        self._proxy = proxy
        self._on_accept = on_accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._on_accept(self, self._proxy, transport.get_extra_info("peername")[1])


def _bind(port: int) -> socket.socket:
    bound = socket.socket()
    # The proxy binds a port twice: once to keep it, once to listen on it.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((HOST, port))
    return bound


async def execute(proxies: Proxies, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command. Returns its answer; raises `ValueError` for an unknown command."""
    peer_port: int = command["peer_port"]
    match command["command"]:
        case "open":
            port = await proxies.open(peer_port, Link.from_json(command["inward"]), Link.from_json(command["outward"]))
            return {"port": port}
        case "set_link":
            proxies[peer_port].set_link(Link.from_json(command["inward"]), Link.from_json(command["outward"]))
            return {}
        case "set_state":
            await proxies[peer_port].set_state(ProxyState(command["state"]))
            return {}
        case "count":
            proxy = proxies[peer_port]
            return {
                "connections": proxy.num_connections,
                "inward": proxy.inward.num_bytes,
                "outward": proxy.outward.num_bytes,
            }
    raise ValueError(f"an unknown command: {command}")


async def main() -> None:
    """Execute the commands on stdin until it ends; then the connections end with the process."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    try:
        async with asyncio.TaskGroup() as tasks:
            proxies = Proxies(tasks)
            while line := await lines.readline():
                print(json.dumps(await execute(proxies, json.loads(line))), flush=True)
            raise _StdinEnded
    except* _StdinEnded:
        pass


class _StdinEnded(Exception):
    """Ends the task group, and with it the connections."""


if __name__ == "__main__":
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    # The only selector whose timeouts are finer than a millisecond. It handles about five hundred connections.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())
