"""Which servers compute anything at all, found out by asking many of them at once.

A server can answer every ping, and do nothing else. So a server that is late is no reason to wait for the next one in
its place alone, which may be of the same kind. The client opens sessions of one token on other servers, on more of them
each time, until those that have computed it hold all the blocks. However many servers do nothing, that takes about a
second. A server can compute such a token and then do nothing, too: it is late again, and is tried last from then on.
"""

# D hidden size

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Set

import torch

from shoal.client.swarm.answers import OTHER_THAN_ASKED, finite, named_tensors
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.swarm import Swarm
from shoal.errors import PeerError
from shoal.peers import ServerInfo
from shoal.policy.routing.costs import Costs, Needs
from shoal.policy.routing.proof import servers_to_probe
from shoal.protocol import Open, Opened, Step, StepResult
from shoal.spans import Span

FIRST_TRIED = 4
"""Servers of the first round, and as many of those that have computed for this client before."""
GROWTH = 4
"""How many times as many servers each round has."""
MOST_TRIED = 256
"""Servers of the largest round."""
NEXT_ROUND_SECONDS = 0.25
"""How soon after a round the next one begins, if those that have computed by then do not hold all blocks."""
USUAL_SECONDS = 0.1
"""How long a server usually takes for each part of a trial."""


async def wait_for_others(swarm: Swarm, server: ServerInfo, span: Span, like: torch.Tensor) -> None:
    """Wait until servers other than this one have computed a token that is made up, in all blocks of a span.

    `like` [B, T, D] has the size and the dtype of the hidden states. Servers that have computed it count as confirmed
    (`Swarm.route`). Those that have not are not blamed: they may have had no time. If there are too few other servers,
    the wait does not end.
    """
    tasks: list[asyncio.Task[None]] = []
    tried: set[str] = set()
    computed: set[str] = set()
    enough = asyncio.Event()

    async def try_one(other: ServerInfo) -> None:
        with contextlib.suppress(PeerError):
            connection = await swarm.connect(other)
            try:
                await _compute_token(swarm, connection, _shared(other.span, span), like)
                computed.add(other.peer)
                swarm.measurements.record_computed(other.peer)
                if not swarm.servers.others(server).only(lambda each: each.peer in computed).missing(span):
                    enough.set()
            finally:
                await connection.close(goodbye=other.peer in computed)

    num_tried = FIRST_TRIED
    try:
        while not enough.is_set():
            for other in _next_round(swarm, server, span, tried, most=num_tried):
                tried.add(other.peer)
                tasks.append(asyncio.create_task(try_one(other)))
            num_tried = min(GROWTH * num_tried, MOST_TRIED)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEXT_ROUND_SECONDS):
                    await enough.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _next_round(swarm: Swarm, server: ServerInfo, span: Span, tried: Set[str], *, most: int) -> list[ServerInfo]:
    """The servers that are tried next: those that have computed for this client, and others."""
    view = swarm.servers.others(server)
    costs = Costs(Needs(), swarm.measurements.measured())
    known = view.only(lambda each: swarm.measurements.is_confirmed(each.peer))
    found: dict[str, ServerInfo] = {}
    for some in (known, view):
        found |= {
            each.peer: each for each in servers_to_probe(some, span, costs, proven=tried, silent=tried, most=most)
        }
    return list(found.values())


async def _compute_token(swarm: Swarm, connection: Connection, span: Span, like: torch.Tensor) -> None:
    """Let a server compute a token that is made up. Raises `PeerError`s."""
    request = Open(
        model=swarm.model.key,
        fingerprint=swarm.fingerprint,
        start=span.start,
        end=span.end,
        batch_size=1,
        expected_length=1,
        encoding=connection.encoding,
    )
    made_up = torch.Generator().manual_seed(secrets.randbits(63))
    hidden_BTD = torch.randn(1, 1, like.shape[-1], generator=made_up).to(like.dtype)
    await connection.ask(request, {}, expect=Opened, usual_seconds=USUAL_SECONDS)
    tensors = named_tensors(hidden_BTD, None, None)
    _, answer = await connection.ask(Step(position=0), tensors, expect=StepResult, usual_seconds=USUAL_SECONDS)
    outputs_BTD = answer.get("hidden")
    if outputs_BTD is None or outputs_BTD.shape != hidden_BTD.shape or not finite(outputs_BTD):
        raise connection.wrong(OTHER_THAN_ASKED)


def _shared(one: Span, other: Span) -> Span:
    """The blocks that are in both spans."""
    return Span(max(one.start, other.start), min(one.end, other.end))
