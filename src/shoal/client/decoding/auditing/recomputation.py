"""Lets other servers compute what a server has answered, as sessions that look like any other."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import logging

import torch

from shoal.client.decoding.auditing.claim import Claim
from shoal.client.decoding.auditing.logits_tail import LogitsTail
from shoal.client.decoding.outputs import Outputs
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.decoding.standby import STANDBY_STEP_TOKENS, compute_beside
from shoal.client.head.logits import Logits
from shoal.client.swarm.comparing.findings import Testimony
from shoal.client.swarm.swarm import Swarm
from shoal.errors import MissingBlocks, PeerError, ServerLost
from shoal.policy.routing.route import Route

log = logging.getLogger(__name__)

RECOMPUTE_SECONDS = 60.0
"""How long witnesses may take: they are asked in portions, behind sessions that decode."""


async def recompute(
    swarm: Swarm, planner: RoutePlanner, claim: Claim, window: tuple[int, int], route: Route
) -> Testimony[torch.Tensor | Logits]:
    """What the servers of a route answer for a claim's inputs: outputs [B, T, D] of the tokens of a window, or logits.

    Raises `SwarmError`s if they fail. Only the caller knows whether the inputs have been changed meanwhile: then the
    result means nothing.
    """
    start, end = window
    news = asyncio.Event()
    pipeline = planner.pipeline(route, claim.inputs, news.set, end=end)
    outputs = Outputs(start)
    pipeline.outputs = outputs
    tail = claim.outputs if isinstance(claim.outputs, LogitsTail) else None
    pipeline.logits_request = None if tail is None else tail.request(end - start)
    if tail is not None and not pipeline.stages[-1].hop.server.head:
        raise MissingBlocks("no other server computes the output head", blocks=tuple(claim.span))
    try:
        async with asyncio.timeout(RECOMPUTE_SECONDS):
            await compute_beside(pipeline, end, news, max_tokens=STANDBY_STEP_TOKENS)
    except PeerError as failure:
        swarm.servers.blame(failure)
        raise
    except TimeoutError:
        slow = pipeline.stages[0].peer
        raise ServerLost(f"{slow} takes longer than {RECOMPUTE_SECONDS:g} s for an audit", peer=slow) from None
    finally:
        await pipeline.disconnect()
    found = outputs.joined()
    if tail is not None:
        assert isinstance(found, Logits)
        found = tail.of_row(found)
    return Testimony.of(found, (hop.server for hop in route.hops))
