"""Servers that accept a connection, or the adapters of a pass, late: others are used once they are known to compute."""

# D hidden size

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import NoReturn

import torch

from shoal.client.swarm.swarm import Swarm
from shoal.client.swarm.trials import wait_for_others
from shoal.client.training.ring_turn import RingTurn
from shoal.concurrency import now
from shoal.errors import ServerLate
from shoal.policy.lateness import late_after, opening_late_after
from shoal.policy.routing.route import Hop

log = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
"""How soon other servers are sought again if there were none."""


class LateStarts:
    """Watches servers until they can be asked for a pass. Nothing is computed for that, so no work is done twice."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._trying: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._left_at: dict[str, float] = {}  # by peer, when others were found to compute while it was late

    async def watch(self, hop: Hop, turn: RingTurn, like: torch.Tensor) -> NoReturn:
        """Raises `ServerLate` if the server is late, and others have computed a token before it can be asked.

        `like` [.., D] has the size and the dtype of the hidden states. Else this does not end.
        """
        peer = hop.server.peer
        while True:
            left = self._late_at(peer, turn) - now()
            if turn.is_ready or not self._has_others(hop):
                await asyncio.sleep(LOOK_SECONDS)
            elif left > 0:
                await asyncio.sleep(left)
            else:
                async with self._trying[peer]:  # many passes may be on their way to it
                    if self._left_at.get(peer, float("-inf")) <= turn.began_at:
                        log.info("%s is late: trying other servers", peer)
                        await wait_for_others(self._swarm, hop.server, hop.span, like)
                if not turn.is_ready:
                    self._left_at[peer] = now()
                    raise ServerLate(f"{peer} was not ready for a pass while others computed", peer=peer)

    def _late_at(self, peer: str, turn: RingTurn) -> float:
        """From when on it is late to accept a connection, or adapters that it was sent."""
        if turn.connection is None:
            return turn.began_at + opening_late_after(self._swarm.measurements.round_trips().get(peer))
        since = now() if turn.awaiting_since is None else turn.awaiting_since
        return since + late_after(0.0, is_proven=self._swarm.measurements.is_confirmed(peer))

    def _has_others(self, hop: Hop) -> bool:
        return not self._swarm.servers.others(hop.server).only(lambda each: each.training).missing(hop.span)
