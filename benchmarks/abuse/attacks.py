"""What an attack is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.abuse.attacked_swarm import AttackedSwarm

SPANS = ("0:6", "6:12")
"""The servers of an attacked swarm, of the bundled model, which has 12 blocks."""


@dataclass(frozen=True)
class Attack:
    """One way to harm a swarm. `run` runs in a process of its own until that is killed, or returns.

    It calls `AttackedSwarm.begun` when the attack is in full swing: from then on the honest client is measured.

    `fair_share`: the part of its speed alone that the honest client is due: 1.0 where the attack asks for no compute,
    0.5 where one attacker asks for as much as it can get. `budget_bytes`: what a server's limits allow the attack to
    hold in its memory. `spans` and `options`: the servers, and what they are started with.
    """

    name: str
    run: Callable[[AttackedSwarm], Awaitable[None]]
    fair_share: float = 1.0
    budget_bytes: int = 0
    spans: tuple[str, ...] = SPANS
    options: tuple[str, ...] = ()
