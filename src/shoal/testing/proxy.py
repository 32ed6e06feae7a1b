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

from shoal.testing.end import End
from shoal.testing.link import Lane, Link
from shoal.testing.reach import HOST, Reach

PRIORITY = -10
BACKLOG = 1024

Greet = Callable[[End, "Door", int], None]
"""Called with somebody's end, the door that he has come to, and the port that he has dialled from."""


class Doors:
    """All the doors, by the ports of the peers behind them."""

    def __init__(self) -> None:
        self._doors: dict[int, Door] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, peer_port: int, inward: Link, outward: Link) -> int:
        """Make a door for the peer that listens on this port; returns the port to announce."""
        door = self._doors[peer_port] = Door(peer_port, inward, outward, self._greet, seed=2 * len(self._doors))
        await door.set_reach(Reach.OPEN)
        return door.port

    def __getitem__(self, peer_port: int) -> Door:
        return self._doors[peer_port]

    def _greet(self, near: End, door: Door, dialled_from: int) -> None:
        """Somebody has come to a door."""
        doors = [door, *filter(None, [self._doors.get(dialled_from)])]
        task = asyncio.create_task(Connection(near, door, doors).run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Door:
    """Where a peer is reached: its link, whether anything passes, and the connections that it has."""

    def __init__(self, peer_port: int, inward: Link, outward: Link, greet: Greet, *, seed: int) -> None:
        self.peer_port = peer_port
        self.inward, self.outward = Lane(inward, seed=seed), Lane(outward, seed=seed + 1)
        self.reach = Reach.OPEN
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

    async def set_reach(self, reach: Reach) -> None:
        self.reach = reach
        if reach is Reach.CUT and self._server is not None:
            self._server.close()
            self._server = None
        elif reach is not Reach.CUT and self._server is None:
            loop, listening = asyncio.get_running_loop(), _bind(self.port)
            self._server = await loop.create_server(lambda: _Near(self, self._greet), sock=listening, backlog=BACKLOG)
        for connection in [*self.connections]:
            connection.update()


class Connection:
    """Two sockets: `near` came to the door, `far` is ours to the peer behind it."""

    def __init__(self, near: End, door: Door, doors: list[Door]) -> None:
        self.near, self.far = near, End(door.outward)
        self._door = door
        self._doors = doors
        self._flows = asyncio.Event()

    async def run(self) -> None:
        """Until it has ended."""
        self._door.num_connections += 1
        for door in self._doors:
            door.connections.add(self)
        try:
            self.update()
            # A handshake goes there and back before anything that is said.
            await asyncio.sleep(self._door.inward.link.delay_seconds + self._door.outward.link.delay_seconds)
            await self._flows.wait()
            if not self.near.is_closing:
                with contextlib.suppress(OSError):
                    await asyncio.get_running_loop().create_connection(lambda: self.far, HOST, self._door.peer_port)
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
            for door in self._doors:
                door.connections.discard(self)

    def update(self) -> None:
        """Do what the doors say now."""
        reaches = {door.reach for door in self._doors}
        flows = reaches == {Reach.OPEN}
        (self._flows.set if flows or Reach.CUT in reaches else self._flows.clear)()
        for end in (self.near, self.far):
            if Reach.CUT in reaches:
                end.reset()
            end.hold(not flows)


class _Near(End):
    """The end of somebody who has come to a door."""

    def __init__(self, door: Door, greet: Greet) -> None:
        super().__init__(door.inward)
        self._door = door
        self._greet = greet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._greet(self, self._door, transport.get_extra_info("peername")[1])


def _bind(port: int) -> socket.socket:
    bound = socket.socket()
    # For us to bind it twice: once to keep it, once to listen.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((HOST, port))
    return bound


async def obey(doors: Doors, order: dict[str, Any]) -> dict[str, Any]:
    """Do what one line says; returns the answer."""
    peer_port: int = order["peer_port"]
    match order["do"]:
        case "open":
            port = await doors.open(peer_port, Link.from_json(order["inward"]), Link.from_json(order["outward"]))
            return {"port": port}
        case "link":
            doors[peer_port].change_link(Link.from_json(order["inward"]), Link.from_json(order["outward"]))
            return {}
        case "reach":
            await doors[peer_port].set_reach(Reach(order["reach"]))
            return {}
        case "count":
            door = doors[peer_port]
            return {
                "connections": door.num_connections,
                "inward": door.inward.num_bytes,
                "outward": door.outward.num_bytes,
            }
    raise ValueError(f"an order that nobody knows: {order}")


async def main() -> None:
    """Obey the lines that come in, until they end."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    doors = Doors()
    while line := await lines.readline():
        print(json.dumps(await obey(doors, json.loads(line))), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    # The only selector whose timeouts are finer than a millisecond; it knows up to some five hundred connections.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())
