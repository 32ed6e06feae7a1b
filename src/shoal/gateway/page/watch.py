"""What the page shows of the swarm: the servers as this client knows them, and what happens."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import shlex
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.client.decoding.session import Session
from shoal.client.swarm.swarm import Swarm
from shoal.gateway.page.page_memory import PageMemory
from shoal.gateway.served_model import ServedModel
from shoal.peers import ServerInfo, short
from shoal.policy.routing.costs import Hop, Needs

LOOK_SECONDS = 1.0
"""How often the page is told of changes that no event tells of, such as queues and new servers."""


async def page_events(served: ServedModel) -> AsyncIterator[str]:
    """Server-sent events for one page: the swarm at first, then what changes, and what happens in words."""
    memory = PageMemory()
    with served.news.reading() as news:
        while True:
            changes = memory.changes(await snapshot(served))
            yield ": nothing new\n\n" if changes is None else f"data: {json.dumps(changes)}\n\n"
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    event = await news.get()
            except TimeoutError:
                continue
            if event is None:
                return
            if (told := memory.told(event)) is not None:
                yield f"data: {json.dumps(told)}\n\n"


async def snapshot(served: ServedModel) -> dict[str, Any]:
    """The servers of a model, and what this gateway's sessions use."""
    blocks = served.model.blocks
    found: dict[str, Any] = await blocks.runtime.awaited(_look(served, blocks))
    return found


async def _look(served: ServedModel, blocks: Any) -> dict[str, Any]:
    swarm: Swarm = blocks.swarm
    everybody = await swarm.servers.everybody()
    usable = (await swarm.servers.present()).only(lambda server: not swarm.servers.is_lost(server.peer))
    sessions = [
        each for each in blocks.runtime.sessions if isinstance(each, Session) and each.hops and not each.is_closed
    ]
    used = Counter(hop.server.peer for session in sessions for hop in session.hops)
    round_trips = swarm.measurements.round_trips()
    names = {short(server.peer): name_of(server) for server in everybody.servers}
    arguments = served.serve_arguments or shlex.quote(served.name)
    return {
        "model": served.name,
        "num_blocks": swarm.model.num_blocks,
        "missing": list(usable.missing(blocks.span)),
        "servers": [
            _described(server, names, sessions=used[server.peer], round_trip=round_trips.get(server.peer))
            | {"lost": swarm.servers.is_lost(server.peer), "usable": swarm.servers.is_usable(server)}
            for server in sorted(everybody.servers, key=lambda each: (each.span.start, each.span.end, each.peer))
        ],
        "way": _way(swarm, _usual([session.hops for session in sessions]), everybody.servers) if sessions else None,
        "join": f"shoal serve {arguments} --initial-peers {_address(everybody.servers)}",
    }


def name_of(server: ServerInfo) -> str:
    """What people call a server: its name, or the end of its peer id."""
    return server.name or server.peer[-8:]


def _usual(ways: Sequence[tuple[Hop, ...]]) -> tuple[Hop, ...]:
    """The way that most sessions take."""
    by_servers = {_places(way): way for way in ways}
    (most, _), *_ = Counter(sorted(map(_places, ways))).most_common(1)
    return by_servers[most]


def _places(way: Sequence[Hop]) -> tuple[tuple[int, str], ...]:
    return tuple((hop.span.start, hop.server.peer) for hop in way)


def _way(swarm: Swarm, hops: Sequence[Hop], servers: Sequence[ServerInfo]) -> dict[str, Any]:
    """The servers that a token visits, and the seconds that it is expected to spend on each and between them."""
    known: Mapping[str, ServerInfo] = {server.peer: server for server in servers}
    hops = [replace(hop, server=known.get(hop.server.peer, hop.server)) for hop in hops]
    route = swarm.price(hops, needs=Needs())
    return {
        "hops": [
            {
                "peer": hop.server.peer,
                "name": name_of(hop.server),
                "start": hop.span.start,
                "end": hop.span.end,
                "network": round(cost.network, 5),
                "compute": None if hop.server.decode_speed is None else round(cost.compute, 5),
                "queue": round(cost.queue, 5),
            }
            for hop, cost in zip(route.hops, route.costs, strict=True)
        ],
        "back": round(route.back, 5),
    }


def _described(server: ServerInfo, names: dict[str, str], *, sessions: int, round_trip: float | None) -> dict[str, Any]:
    return {
        "peer": server.peer,
        "name": name_of(server),
        "start": server.span.start,
        "end": server.span.end,
        "state": str(server.state),
        "ready_in": None if server.ready_at is None else round(server.ready_at - time.time()),
        "speed": server.decode_speed,
        "room": server.cache_tokens_left,
        "queue": server.queue_length,
        "sessions": sessions,
        "round_trip": None if round_trip is None else round(round_trip, 4),
        "links": [{"name": names[name], "seconds": seconds} for name, seconds in server.round_trips if name in names],
        "dtype": server.dtype,
        "quantization": server.quantization,
        "reason": server.reason,
    }


def _address(servers: Iterable[ServerInfo]) -> str:
    """An address to join by: that of a server which others can dial, from other machines if there is one."""
    found = [server.addresses[0] for server in servers if server.addresses and not server.is_relayed]
    return min(found, key=_is_loopback, default="ADDRESS")


def _is_loopback(address: str) -> bool:
    host = address.split("/")[2:3]
    try:
        return ipaddress.ip_address(host[0]).is_loopback if host else False
    except ValueError:
        return False  # a name
