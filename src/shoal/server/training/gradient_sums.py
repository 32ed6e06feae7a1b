"""The sums of factors' gradients that a server makes for clients: those of many backward passes travel once.

Sums are made in float64. There the sum of gradients in float32 is exact, unless one of them is 2^29 times as small as
another, so it does not depend on the order in which the passes come.
"""

# N factors

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from shoal.protocol import MAX_SUMMED_PASSES, Backward
from shoal.server.executor import alone
from shoal.server.refusals import rejected
from shoal.server.training.saved_activations import ByteBudget

MAX_SUMS = 64
"""The sums of one client: about one for each batch that it trains at a time, more after failures."""

KEPT_SECONDS = 600.0
"""A sum is dropped if nothing came into it for so long: in a slow batch, minutes may be between two microbatches. The
sums of a client that has left, or has nothing computed any more, are dropped with its last stream."""


@dataclass(frozen=True)
class TakenSum:
    """A sum [N] of `num_passes` passes, in float32, and the indices of the factor tensors that none of them used."""

    factors_N: torch.Tensor
    num_passes: int
    unused: tuple[int, ...]


@dataclass(eq=False)
class GradientSum:
    """One sum. Passes are added on the compute thread, and it is taken and dropped on any thread.

    `of` says what it is a sum of: passes of something else are not added. It takes bytes of all `budgets`.
    """

    of: Hashable
    budgets: tuple[ByteBudget, ...]
    num_passes: int = 0
    _values_N: torch.Tensor | None = None
    _unused: frozenset[int] = frozenset()
    _is_rest: bool = False
    _is_dropped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, factors_N: torch.Tensor, unused: Sequence[int]) -> bool:
        """Add what a pass has found. Returns whether it was added: if not, there is no room, or the sum is gone."""
        with self._lock:
            if self._is_dropped or self._is_rest or self.num_passes == MAX_SUMMED_PASSES:
                return False
            if self._values_N is None:
                if not self._reserve(factors_N.numel() * torch.float64.itemsize):
                    return False
                self._values_N, self._unused = factors_N.cpu().double(), frozenset(unused)
            else:
                self._values_N += factors_N.cpu()
                self._unused &= frozenset(unused)
            self.num_passes += 1
            return True

    def take(self, *, keeps_rest: bool) -> TakenSum | None:
        """The sum in float32; None if nothing is in it. What rounding took away stays, once, if it `keeps_rest`."""
        with self._lock:
            if self._values_N is None:
                return None
            factors_N = self._values_N.float()
            if keeps_rest and not self._is_rest:
                self._values_N -= factors_N
                self._values_N[~factors_N.isfinite()] = 0.0  # nothing is to be added to what is infinite already
                self._is_rest = True
                return TakenSum(factors_N, self.num_passes, tuple(sorted(self._unused)))
        self.drop()
        return TakenSum(factors_N, self.num_passes, tuple(sorted(self._unused)))

    def drop(self) -> None:
        """Give its memory back. May be called twice."""
        with self._lock:
            self._is_dropped = True
            if self._values_N is not None:
                for budget in self.budgets:
                    budget.release(self._values_N.nbytes)
                self._values_N = None

    @property
    def is_dropped(self) -> bool:
        """Whether nothing is left of it."""
        return self._is_dropped

    def _reserve(self, num_bytes: int) -> bool:
        reserved: list[ByteBudget] = []
        for budget in self.budgets:
            if not budget.reserve(num_bytes):
                for each in reserved:
                    each.release(num_bytes)
                return False
            reserved.append(budget)
        return True


@dataclass
class _Kept:
    sum: GradientSum
    expiry: asyncio.TimerHandle


class GradientSums:
    """The sums of all clients, by the client's peer id and the name that it gave to the sum.

    They count in the `budget` of what is saved for backward passes, those of one client for at most `client_bytes`. A
    sum into which nothing came, and which was not taken, for `seconds` is dropped.
    """

    def __init__(self, budget: ByteBudget, *, client_bytes: int, seconds: float) -> None:
        self._budget = budget
        self.client_bytes = client_bytes
        self._seconds = seconds
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._budgets: dict[str, ByteBudget] = {}  # by client
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, peer: str, request: Backward) -> GradientSum | None:
        """The sum that a client's pass belongs to; None if it belongs to none, or the client has too many.

        Raises `Refused` if the sum is one of other passes.
        """
        if request.into is None:
            return None
        of = request.start, request.end, request.adapters, request.frozen
        key = peer, request.into
        if key not in self._kept:
            if sum(holder == peer for holder, _ in self._kept) >= MAX_SUMS:
                return None
            own = self._budgets.setdefault(peer, ByteBudget(self.client_bytes))
            self._kept[key] = _Kept(GradientSum(of, (own, self._budget)), self._expiry(key))
            self._is_empty.clear()
        kept = self._kept[key]
        if kept.sum.of != of:
            raise rejected("a sum of gradients of other factors")
        kept.expiry.cancel()
        kept.expiry = self._expiry(key)
        return kept.sum

    async def take(self, peer: str, name: str, *, keeps_rest: bool) -> TakenSum | None:
        """A client's sum, in float32; None if there is none. `keeps_rest`: as `GradientSum.take`."""
        kept = self._kept.get((peer, name))
        if kept is None:
            return None
        taken = await asyncio.to_thread(alone, lambda: kept.sum.take(keeps_rest=keeps_rest))
        if taken is None or kept.sum.is_dropped:
            self._drop((peer, name))
        return taken

    def release(self, peer: str) -> None:
        """Drop all sums of a client, which is gone."""
        for key in [key for key in self._kept if key[0] == peer]:
            self._drop(key)

    async def wait_until_taken(self) -> None:
        """Returns when there is none: all were taken or dropped."""
        await self._is_empty.wait()

    def _expiry(self, key: tuple[str, str]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._seconds, self._drop, key)

    def _drop(self, key: tuple[str, str]) -> None:
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        kept.expiry.cancel()
        kept.sum.drop()
        if not any(holder == key[0] for holder, _ in self._kept):
            del self._budgets[key[0]]
        if not self._kept:
            self._is_empty.set()
