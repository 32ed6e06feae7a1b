"""Who a stream's requests count for, and how many small messages of one payer a server answers in a second."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from shoal.net.addressing.addresses import network_of
from shoal.net.transport import Stream
from shoal.policy.network.pacing import Pacer

PINGS_PER_SECOND = 200.0
"""Messages of one payer that ask for no compute. Each takes about a fifth of a millisecond of the event loop, and a
client sends one in some seconds to each server, and for each session that waits."""
INTRODUCTIONS_PER_SECOND = 20.0
"""Introductions of one payer. Each may take 2 ms of a core, for twenty signatures; a client sends one with a stream."""
MAX_PACERS = 4096
"""The payers that are remembered. One that is forgotten may send as many at once as in a second."""


def payer_behind(stream: Stream) -> str:
    """Who the requests of a stream count for: its peer's network, or the peer itself where that is not known."""
    return stream.peer if stream.address is None else network_of(stream.address)


class PingPace:
    """Lets the messages of a payer wait if more come than `per_second`: they are answered late."""

    def __init__(self, per_second: float = PINGS_PER_SECOND) -> None:
        self._per_second = per_second
        self._pacers: OrderedDict[str, Pacer] = OrderedDict()

    async def turn(self, payer: str) -> None:
        """Returns when one more message of the payer may be answered."""
        pacer = self._pacers.setdefault(payer, Pacer(self._per_second))
        self._pacers.move_to_end(payer)
        if len(self._pacers) > MAX_PACERS:
            self._pacers.popitem(last=False)
        if wait := pacer.reserve(1, now=asyncio.get_running_loop().time()):
            await asyncio.sleep(wait)
