"""Limits the memory for frames that are being received, for each peer over all of its streams."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from shoal.protocol import MAX_PAYLOAD_BYTES


@dataclass
class _PeerBudget:
    """The bytes that one peer holds, and the frames that wait for bytes, in the order of their arrival."""

    num_bytes: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class ReceiveBudget:
    """Each peer may hold `max_bytes`, by default one payload of the largest size. A frame beyond that waits.

    A frame that is larger than `max_bytes` is admitted while its peer holds nothing else.
    """

    def __init__(self, max_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._budgets: dict[str, _PeerBudget] = {}

    @property
    def num_peers(self) -> int:
        """The number of peers that hold bytes or wait for them."""
        return len(self._budgets)

    async def acquire(self, peer: str, num_bytes: int) -> None:
        """Wait until the peer may hold a payload of this size. `release` it when it has been received or lost."""
        budget = self._budgets.setdefault(peer, _PeerBudget())
        if not budget.waiting and self._fits(budget, num_bytes):
            budget.num_bytes += num_bytes
            return
        waiter = num_bytes, asyncio.get_running_loop().create_future()
        budget.waiting.append(waiter)
        try:
            await waiter[1]
        except asyncio.CancelledError:
            if waiter in budget.waiting:
                budget.waiting.remove(waiter)
                self._admit_next(peer, budget)
            else:  # it was admitted at the moment of the cancellation
                self.release(peer, num_bytes)
            raise

    def release(self, peer: str, num_bytes: int) -> None:
        """Return what `acquire` gave, and admit the frames that fit now."""
        budget = self._budgets[peer]
        budget.num_bytes -= num_bytes
        self._admit_next(peer, budget)

    def _fits(self, budget: _PeerBudget, num_bytes: int) -> bool:
        return not budget.num_bytes or budget.num_bytes + num_bytes <= self._max_bytes

    def _admit_next(self, peer: str, budget: _PeerBudget) -> None:
        while budget.waiting and self._fits(budget, budget.waiting[0][0]):
            num_bytes, admitted = budget.waiting.popleft()
            budget.num_bytes += num_bytes
            admitted.set_result(None)
        if not budget.num_bytes and not budget.waiting:
            del self._budgets[peer]
