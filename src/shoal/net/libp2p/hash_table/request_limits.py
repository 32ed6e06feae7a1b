"""How much one peer, and all peers of one network, may ask of this peer's part of the DHT in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shoal.policy.census.allowance import Allowance
from shoal.policy.network.table_room import Origin

MOST_REMEMBERED = 4096
"""When more peers and networks than these have asked, the half that asked longest ago is forgotten."""


@dataclass(frozen=True)
class Rate:
    """What one peer, and what one network may have in a minute."""

    of_peer: float
    of_network: float


STORED = Rate(256, 16_384)
"""Records. A server renews up to five, three times a minute; each costs a quarter of a millisecond to check."""
ANSWERED = Rate(16 << 20, 1 << 30)
"""Bytes of answers. Eight times what a client reads in a minute, from all peers together (`CLIENT_BYTES`)."""


class RequestLimits:
    """Counts what peers ask for. `clock` gives seconds that only grow."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left: dict[str, Allowance] = {}

    def allows(self, peer: str, origin: Origin) -> bool:
        """Whether a peer at this network may ask for more."""
        now = self._clock()
        return all(allowance.allows(now=now) for allowance in self._of(peer, origin).values())

    def spent(self, amount: float, peer: str, origin: Origin) -> None:
        """The peer had this."""
        now = self._clock()
        for name, each in self._of(peer, origin).items():
            self._left.pop(name, None)
            self._left[name] = each.spent(amount, now=now)
        if len(self._left) > MOST_REMEMBERED:
            self._left = dict([*self._left.items()][MOST_REMEMBERED // 2 :])

    def _of(self, peer: str, origin: Origin) -> dict[str, Allowance]:
        rates = {peer: self._rate.of_peer, origin.narrow: self._rate.of_network}
        return {name: self._left.get(name, Allowance.full(rate)) for name, rate in rates.items()}
