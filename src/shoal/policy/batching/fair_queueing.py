"""How many seconds of compute each payer has used: start-time fair queueing (Goyal, Vin and Cheng, 1996).

A payer is who a request counts for: a peer's network (`shoal.net.addressing.addresses.network_of`), or the peer where
that is not known. Among payers that want more, the one that has used least comes first, so each gets its share within
one quantum. A payer that comes back after a pause begins where the one is now that has used least: time that it did not
want is not saved up. Payers may have weights (`shoal.policy.contribution.priority`): one of weight 4 is charged a
quarter of the time, and gets four times as much.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

QUANTUM_SECONDS = 1.0
"""Payers whose use differs by less come in order of arrival: what is short is computed in one go, and not in turns."""
MAX_PAYERS = 4096
"""The payers that are remembered at most. Those that have used least beyond the others are forgotten first."""


@dataclass(frozen=True)
class FairQueue:
    """The seconds that payers have `used`, as far as that is more than `floor`, which is what all others count for."""

    used: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0.0

    def of(self, payer: str) -> float:
        """The seconds that a payer counts as having used."""
        return self.used.get(payer, self.floor)

    def charged(
        self, seconds: Mapping[str, float], *, waiting: Collection[str], weights: Mapping[str, float] | None = None
    ) -> FairQueue:
        """After these payers used these seconds more, while the `waiting` ones want more still.

        A payer counts as having used its seconds divided by its weight, which is 1 if it is not named.
        """
        weights = weights or {}
        counted = {payer: more / weights.get(payer, 1.0) for payer, more in seconds.items()}
        used = {**self.used, **{payer: self.of(payer) + more for payer, more in counted.items()}}
        if waiting:
            floor = max(self.floor, min(used.get(payer, self.floor) for payer in waiting))
        else:
            floor = max([self.floor, *used.values()])
        kept = {payer: total for payer, total in used.items() if total > floor}
        while len(kept) > MAX_PAYERS:
            del kept[min(kept, key=lambda payer: kept[payer])]
        return FairQueue(kept, floor)

    def turn_of(self, payer: str, among: Collection[str]) -> int:
        """In which turn a payer comes `among` those that wait: 0 for those within a quantum of the least."""
        least = min(self.of(each) for each in among)
        return int((self.of(payer) - least) / QUANTUM_SECONDS)
