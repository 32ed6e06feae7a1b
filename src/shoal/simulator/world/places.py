"""Where machines and clients are, and how long messages travel between them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

OCEAN = 0.09
"""Seconds that a round trip between the continents adds. Within a continent it takes 2 to 30 ms."""


@dataclass(frozen=True)
class Place:
    """A place on one of two continents."""

    continent: int
    x: float
    y: float

    @classmethod
    def anywhere(cls, rng: random.Random) -> Place:
        """A place drawn at random."""
        return cls(rng.randrange(2), rng.random(), rng.random())

    def round_trip(self, other: Place) -> float:
        """Seconds from here to the other place and back."""
        near = 0.002 + 0.02 * math.hypot(self.x - other.x, self.y - other.y)
        return near + (OCEAN if self.continent != other.continent else 0.0)

    @property
    def zone(self) -> str:
        """A coarse name of the place: a quarter of a continent."""
        return f"zone{self.continent}{int(2 * self.x)}{int(2 * self.y)}"
