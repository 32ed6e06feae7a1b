"""What the page shows of the swarm: the servers as this client knows them, and what happens."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

from shoal.client.decoding.session import Session
from shoal.gateway.served_model import ServedModel
from shoal.peers import ServerInfo, short

LOOK_SECONDS = 1.0
"""How often the page is told of changes that no event tells of, such as queues and new servers."""


async def page_events(served: ServedModel) -> AsyncIterator[str]:
    """Server-sent events for one page: a snapshot at first and whenever something has changed, and lines of text."""
    with served.news.reading() as lines:
        shown = ""
        while True:
            found = json.dumps({"type": "swarm", **await snapshot(served)})
            yield ": nothing new\n\n" if found == shown else f"data: {found}\n\n"
            shown = found
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    line = await lines.get()
            except TimeoutError:
                continue
            if line is None:
                return
            yield f"data: {json.dumps({'type': 'event', 'text': line})}\n\n"


async def snapshot(served: ServedModel) -> dict[str, Any]:
    """The servers of a model, and what this gateway's sessions use."""
    blocks = served.model.blocks
    found: dict[str, Any] = await blocks.runtime.awaited(_look(served, blocks))
    return found


async def _look(served: ServedModel, blocks: Any) -> dict[str, Any]:
    swarm = blocks.swarm
    everybody = await swarm.everybody()
    usable = await swarm.present()
    sessions = [
        each for each in blocks.runtime.sessions if isinstance(each, Session) and each.hops and not each.is_closed
    ]
    used = Counter(hop.server.peer for session in sessions for hop in session.hops)
    names = {short(server.peer): server.name or server.peer[-8:] for server in everybody.servers}
    hops = sessions[-1].hops if sessions else ()
    return {
        "model": served.name,
        "num_blocks": swarm.model.num_blocks,
        "missing": list(usable.missing(blocks.span)),
        "servers": [
            _described(
                server, names, sessions=used[server.peer], round_trip=swarm.timings.round_trips().get(server.peer)
            )
            | {"lost": swarm.is_avoided(server.peer)}
            for server in sorted(everybody.servers, key=lambda each: (each.span.start, each.span.end, each.peer))
        ],
        "route": [{"name": names.get(short(hop.server.peer), "?"), "blocks": str(hop.span)} for hop in hops],
        "join": f"shoal serve {served.name} --initial-peers {_address(everybody.servers)}",
    }


def _described(server: ServerInfo, names: dict[str, str], *, sessions: int, round_trip: float | None) -> dict[str, Any]:
    return {
        "peer": server.peer,
        "name": server.name,
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
    """An address to join by: that of a server which others can dial."""
    found = [server for server in servers if server.addresses and not server.is_relayed]
    return found[0].addresses[0] if found else "ADDRESS"
