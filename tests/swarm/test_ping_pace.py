"""A peer that sends pings all the time is answered late, and keeps no other waiting."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.protocol import Ping
from shoal.server.rpc.ping_pace import PINGS_PER_SECOND, PingPace, payer_behind
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.streams import Handler

from .virtual_time import run

SECONDS = 10.0


class IdleEngine:
    """What a pong tells of an engine that does nothing."""

    num_passes = queue_length = cache_tokens_left = 0

    class passes:  # noqa: N801 - as the attribute of an engine
        @staticmethod
        def release(peer: str) -> None:
            """A client is gone."""


def test_pings_of_one_payer_are_answered_at_a_pace_and_those_of_others_at_once():
    async def flood(stream: Stream, pongs: list[float]) -> None:
        while True:
            await codec.send(stream, Ping())
            await codec.receive(stream)
            pongs.append(asyncio.get_running_loop().time())

    async def scene() -> tuple[int, float]:
        network = MemoryNetwork()
        server, attacker, honest = (network.node(name) for name in ("server", "attacker", "honest"))
        handler = Handler(cast(Any, IdleEngine()), PushService(server.transport), idle_seconds=60.0)
        await server.transport.listen(handler)
        pongs: list[float] = []
        streams = [await attacker.transport.open("server") for _ in range(60)]
        floods = [asyncio.create_task(flood(stream, pongs)) for stream in streams]
        await asyncio.sleep(SECONDS)
        stream = await honest.transport.open("server")
        asked = asyncio.get_running_loop().time()
        await codec.send(stream, Ping())
        await codec.receive(stream)
        took = asyncio.get_running_loop().time() - asked
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        for node in (attacker, honest, server):
            await node.transport.close()
        return len(pongs), took

    num_pongs, took = run(scene())
    assert num_pongs <= PINGS_PER_SECOND * (SECONDS + 1) + 60
    assert took < 0.01


def test_a_payer_may_send_some_at_once():
    async def turns() -> list[float]:
        pace, loop = PingPace(), asyncio.get_running_loop()
        at = []
        for _ in range(int(3 * PINGS_PER_SECOND)):
            await pace.turn("payer")
            at.append(loop.time())
        return at

    at = run(turns())
    assert at[int(PINGS_PER_SECOND) - 1] < 0.01
    assert 1.9 < at[-1] < 2.1


def test_a_peer_whose_address_is_not_known_counts_for_itself():
    class Known:
        peer, address = "peer", "/ip4/8.8.4.200/tcp/5"

    class Unknown:
        peer, address = "peer", None

    assert payer_behind(cast(Any, Known())) == "8.8.4.0/24"
    assert payer_behind(cast(Any, Unknown())) == "peer"
