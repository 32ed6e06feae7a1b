"""How long machines are expected to stay, from what was seen of them.

A machine that has stayed for long is likely to stay for longer: the rate at which machines leave falls with their age,
and differs between zones. The rate is estimated for some ranges of age, of all machines and of each zone, and shrunk
towards what is known without having seen any.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from shoal.policy.machines.machine import Machine

AGES = (0.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 16 * 3600.0)
"""Where the ranges of age begin, in seconds. The last has no end."""
LOSS_SECONDS = 120.0
"""The time in which a machine that vanishes is not replaced yet: to notice it, and to load its blocks elsewhere."""
FALLING_RATE = 0.3
"""Before any machine was seen: the fraction of machines of age t that leave in the next t seconds."""
PRIOR_LEAVES = 2.0
"""That guess counts as much as this many observed departures in each range of age."""
ZONE_LEAVES = 3.0
"""The rate of all machines counts in the estimate for one zone as much as this many."""
MAX_ZONES = 64

Rates = tuple[float, ...]


@dataclass(frozen=True)
class Lifetimes:
    """Rates of leaving, per second, by range of age: of all machines, and of those zones that were seen."""

    everywhere: Rates
    by_zone: Mapping[str, Rates] = field(default_factory=dict)

    def survival(self, zone: str, age: float, seconds: float) -> float:
        """The chance that a machine of this age stays for `seconds` more."""
        return math.exp(-sum(rate * spent for rate, spent in self._ahead(zone, age, seconds)))

    def loss(self, zone: str, age: float) -> float:
        """The chance that a machine of this age vanishes before another could take its place."""
        return 1.0 - self.survival(zone, age, LOSS_SECONDS)

    def typical_loss(self, age: float) -> float:
        """The same for machines of any zone, in as many steps as there are ranges of age.

        So views that are some seconds apart say the same of almost all machines, and lead to equal plans.
        """
        return self.loss("", AGES[bisect_right(AGES, max(0.0, age)) - 1])

    def remaining(self, zone: str, age: float) -> float:
        """Seconds that a machine of this age is expected to stay."""
        expected, alive = 0.0, 1.0
        for rate, spent in self._ahead(zone, age, math.inf):
            stays = math.exp(-rate * spent)
            expected += alive * (1.0 - stays) / rate
            alive *= stays
        return expected

    def _ahead(self, zone: str, age: float, seconds: float) -> Iterable[tuple[float, float]]:
        """The rate of each range of age that a machine passes in the next seconds, and how long it is in it."""
        rates = self.by_zone.get(zone, self.everywhere)
        age = max(0.0, age)
        for rate, (begin, end) in zip(rates, pairwise((*AGES, math.inf)), strict=True):
            spent = min(age + seconds, end) - max(age, begin)
            if spent > 0:
                yield rate, spent


@dataclass(frozen=True)
class Lives:
    """The machines that were seen to come and go: what lifetimes are estimated from.

    `here` are those that are in the swarm: zone, and when it came up. `left` counts departures and `stayed` the seconds
    of those that left, by range of age, for each zone.
    """

    here: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    left: Mapping[str, Rates] = field(default_factory=dict)
    stayed: Mapping[str, Rates] = field(default_factory=dict)

    def joined(self, peer: str, zone: str, up_since: float) -> Lives:
        """A machine came up."""
        return replace(self, here={**self.here, peer: (zone, up_since)})

    def departed(self, peer: str, now: float) -> Lives:
        """A machine left or vanished; no change if it was not known."""
        if peer not in self.here:
            return self
        zone, since = self.here[peer]
        if zone not in self.left and len(self.left) >= MAX_ZONES:
            zone = ""
        none = (0.0,) * len(AGES)
        age = max(0.0, now - since)
        at = sum(begin <= age for begin in AGES) - 1
        left = tuple(count + (index == at) for index, count in enumerate(self.left.get(zone, none)))
        stayed = _sum(self.stayed.get(zone, none), _seconds_by_age(age))
        return Lives(
            {other: life for other, life in self.here.items() if other != peer},
            {**self.left, zone: left},
            {**self.stayed, zone: stayed},
        )

    def after_view(self, machines: Iterable[Machine], now: float) -> Lives:
        """What is known after another look at the swarm."""
        present = {machine.peer: machine for machine in machines}
        lives = self
        for peer in sorted(self.here.keys() - present.keys()):
            lives = lives.departed(peer, now)
        new = {peer: (machine.zone, machine.up_since) for peer, machine in present.items() if peer not in lives.here}
        return replace(lives, here={**lives.here, **new}) if new else lives

    def lifetimes(self, now: float) -> Lifetimes:
        """The rates of leaving that fit what was seen."""
        none = (0.0,) * len(AGES)
        stayed: dict[str, Rates] = dict(self.stayed)
        for zone, since in self.here.values():
            known = zone if zone in stayed or len(stayed) < MAX_ZONES else ""
            stayed[known] = _sum(stayed.get(known, none), _seconds_by_age(max(0.0, now - since)))
        left_of_all, stayed_of_all = none, none
        for counts in self.left.values():
            left_of_all = _sum(left_of_all, counts)
        for seconds in stayed.values():
            stayed_of_all = _sum(stayed_of_all, seconds)
        everywhere = _shrunk(left_of_all, stayed_of_all, _prior(), PRIOR_LEAVES)
        return Lifetimes(
            everywhere,
            {zone: _shrunk(self.left.get(zone, none), stayed[zone], everywhere, ZONE_LEAVES) for zone in stayed},
        )


def _prior() -> Rates:
    ends = (*AGES[1:], 4 * AGES[-1])
    return tuple(FALLING_RATE / math.sqrt(max(begin, 15.0) * end) for begin, end in zip(AGES, ends, strict=True))


BEFORE_ANY_WAS_SEEN = Lifetimes(_prior())
"""What is known of lives without having seen any."""


def _shrunk(left: Rates, stayed: Rates, expected: Rates, leaves: float) -> Rates:
    return tuple(
        (count + leaves) / (seconds + leaves / rate)
        for count, seconds, rate in zip(left, stayed, expected, strict=True)
    )


def _seconds_by_age(age: float) -> Rates:
    return tuple(max(0.0, min(age, end) - begin) for begin, end in pairwise((*AGES, math.inf)))


def _sum(one: Rates, other: Rates) -> Rates:
    return tuple(a + b for a, b in zip(one, other, strict=True))
