"""Many clients at once, which all see the same servers: their sessions share these. In virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest

from shoal.client.decoding.session import Session
from shoal.client.options.client_options import ClientOptions
from shoal.policy.routing.route import Chooser
from shoal.server.engine.engine import Engine
from shoal.spans import Span

from .schedules.bed import Bed, Client
from .schedules.oracle import oracle
from .schedules.work import prompt
from .virtual_time import run

NUM_CLIENTS = 8


async def server_of(client: Client) -> str:
    """The server that a session of this client reads a prompt on."""
    session = Session(client.swarm, Span(0, 4), batch_size=1, max_length=16)
    await session.step(oracle().embed(prompt(1, 5)), 0, None, None)
    (hop,) = session.hops
    await session.close()
    return hop.server.peer


async def used(chooser: Chooser, *, queue_length: int) -> Counter[str]:
    """On how many of four nearly equal servers how many of eight clients begin, where all servers announce a queue."""
    async with Bed(("0:4",) * 4, cache_pages=160, drain_seconds=0.0) as bed:
        await asyncio.sleep(2.0)  # the servers have measured each other, and announce nothing new for a while
        bed.network.edit_announcements(
            lambda info: replace(
                info, queue_length=queue_length, decode_speed=60.0 if info.peer == "s0" else 50.0, prefill_speed=5000.0
            )
        )
        clients = [bed.client(f"client{index}", ClientOptions(chooser=chooser)) for index in range(NUM_CLIENTS)]
        with mock.patch.object(Engine, "queue_length", queue_length):  # answers to pings say it too
            found = Counter(await asyncio.gather(*(server_of(client) for client in clients)))
        for client in clients:
            await client.close()
        return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eight_clients_at_once_share_the_servers_while_these_are_busy(seed: int):
    random.seed(seed)
    found = run(used("balanced", queue_length=3))
    assert len(found) >= 3
    assert max(found.values()) <= NUM_CLIENTS // 2 + 1


@pytest.mark.parametrize("chooser", ["balanced", "shortest"])
def test_the_same_clients_take_the_fastest_server_while_all_are_idle(chooser: Chooser):
    random.seed(0)
    assert run(used(chooser, queue_length=0)) == {"s0": NUM_CLIENTS}


def test_without_sharing_all_of_them_take_the_fastest_although_all_are_busy():
    random.seed(0)
    assert run(used("shortest", queue_length=3)) == {"s0": NUM_CLIENTS}
