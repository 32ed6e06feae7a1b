"""How much of frames that are not whole yet is held in memory for one peer, over all of its streams."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from shoal.protocol import MAX_PAYLOAD_BYTES


@dataclass
class _Share:
    """What one peer has, and the frames that wait for more, as they came."""

    taken: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class UnfinishedFrames:
    """Room for `most_bytes` of each peer, as many as the largest frame has. What has no room waits for the others."""

    def __init__(self, most_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._most_bytes = most_bytes
        self._shares: dict[str, _Share] = {}

    async def take(self, peer: str, num_bytes: int) -> None:
        """Wait for room for a whole payload; to be given back once it is here, or never will be."""
        share = self._shares.setdefault(peer, _Share())
        if not share.waiting and self._fits(share, num_bytes):
            share.taken += num_bytes
            return
        place = num_bytes, asyncio.get_running_loop().create_future()
        share.waiting.append(place)
        try:
            await place[1]
        except asyncio.CancelledError:
            if place in share.waiting:
                share.waiting.remove(place)
                self._admit(peer, share)
            else:  # it was let in at the same moment
                self.give_back(peer, num_bytes)
            raise

    def give_back(self, peer: str, num_bytes: int) -> None:
        """A frame is whole, or will never be."""
        share = self._shares[peer]
        share.taken -= num_bytes
        self._admit(peer, share)

    def _fits(self, share: _Share, num_bytes: int) -> bool:
        return not share.taken or share.taken + num_bytes <= self._most_bytes

    def _admit(self, peer: str, share: _Share) -> None:
        while share.waiting and self._fits(share, share.waiting[0][0]):
            num_bytes, admitted = share.waiting.popleft()
            share.taken += num_bytes
            admitted.set_result(None)
        if not share.taken and not share.waiting:
            del self._shares[peer]
