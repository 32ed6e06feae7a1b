"""How much one peer, and all peers of one network, may ask of this peer's part of the DHT."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shoal.policy.census.allowance import MINUTE, Allowance
from shoal.policy.network.table_room import Origin

WINDOW_SECONDS = 10.0
"""The time for which a rate is. What is not asked for in this time is not saved: there are no bursts."""
MOST_REMEMBERED = 4096
"""When more peers and networks than these have asked, the half that asked longest ago is forgotten."""


@dataclass(frozen=True)
class Rate:
    """What one peer, and what one network may have in `WINDOW_SECONDS`."""

    of_peer: float
    of_network: float


STORED = Rate(64, 4096)
"""Records. A server renews up to five every 20 seconds; each costs a quarter of a millisecond to check."""
ANSWERED = Rate(4 << 20, 64 << 20)
"""Bytes of answers. A peer reads 2.2 MB in a minute, from all others together (`shoal.net.participant`)."""
KEY_COST_BYTES = 512
"""A key that is looked up counts for at least this: without a record it takes time too."""


class RequestLimits:
    """Counts what peers ask for. `clock` gives seconds that only grow."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left: dict[str, Allowance] = {}

    def __len__(self) -> int:
        """How many peers and networks are remembered."""
        return len(self._left)

    def allows(self, peer: str, origin: Origin) -> bool:
        """Whether a peer at this network may ask for more."""
        now = self._now()
        return all(allowance.allows(now=now) for allowance in self._of(peer, origin).values())

    def spent(self, amount: float, peer: str, origin: Origin) -> None:
        """The peer had this."""
        now = self._now()
        for name, each in self._of(peer, origin).items():
            self._left.pop(name, None)
            self._left[name] = each.spent(amount, now=now)
        if len(self._left) > MOST_REMEMBERED:
            self._left = dict([*self._left.items()][MOST_REMEMBERED // 2 :])

    def _of(self, peer: str, origin: Origin) -> dict[str, Allowance]:
        rates = {peer: self._rate.of_peer, origin.narrow: self._rate.of_network}
        return {name: self._left.get(name, Allowance.full(rate)) for name, rate in rates.items()}

    def _now(self) -> float:
        """The time by which a window is a minute, as that of an `Allowance` is."""
        return self._clock() * MINUTE / WINDOW_SECONDS
