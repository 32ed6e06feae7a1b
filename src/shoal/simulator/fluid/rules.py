"""What a simulated server asks when it decides where to serve: the interface, and the rules of the live servers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.policy.placement.joining import choose_blocks
from shoal.policy.placement.machines import Machine
from shoal.policy.placement.mover import Mover
from shoal.policy.placement.petals import choose_span
from shoal.policy.placement.throughput import block_throughputs
from shoal.spans import Span


@dataclass(frozen=True)
class Decision:
    """What a server does after it has looked at the swarm.

    It `claims` a span: it announces itself as joining there. It `goes` to a span: it moves now. `None` for nothing;
    a server that does not claim any more announces again where it is. It looks again at the time `look_at`, or when it
    reads the directory the next time.
    """

    claims: Span | None = None
    goes: Span | None = None
    look_at: float | None = None


STAY = Decision()


class Steward(Protocol):
    """Decides for one server that is online."""

    def look(self, machines: Sequence[Machine], *, now: float) -> Decision:
        """After the server has read these machines, its own among them."""


class Rule(Protocol):
    """A way to choose blocks when a server starts, and to move later."""

    name: str

    def join(self, machine: Machine, others: Sequence[Machine], num_blocks: int, rng: random.Random) -> Span:
        """The span that a new server takes; `machine.span` is `None`."""

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        """What decides for a server that is online; `None` if it never moves."""


@dataclass(frozen=True)
class Never:
    """The server chooses by PETALS' rule when it starts, and stays there: what shoal did before it moved servers."""

    name: str = "no moves"

    def join(self, machine: Machine, others: Sequence[Machine], num_blocks: int, rng: random.Random) -> Span:
        return petals_span(machine, others, num_blocks)

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return None


@dataclass(frozen=True)
class Graded:
    """The server chooses by the graded score when it starts, and stays there."""

    name: str = "graded joining"

    def join(self, machine: Machine, others: Sequence[Machine], num_blocks: int, rng: random.Random) -> Span:
        return choose_blocks(machine, others, num_blocks, rule="graded", rng=rng).span

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return None


@dataclass(frozen=True)
class SharedPlan(Graded):
    """The live rule: graded joining, and every server does its own steps of the plan that all compute."""

    name: str = "shared plan"

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return MoverSteward(peer, num_blocks)


class MoverSteward:
    """Drives the live state machine."""

    def __init__(self, peer: str, num_blocks: int) -> None:
        self._mover = Mover(peer=peer, num_blocks=num_blocks)

    def look(self, machines: Sequence[Machine], *, now: float) -> Decision:
        raise NotImplementedError


def petals_span(machine: Machine, others: Sequence[Machine], num_blocks: int) -> Span:
    """Where PETALS puts a new server: as many blocks as fit, where the swarm is weakest."""
    return choose_span(block_throughputs(others, num_blocks), num_blocks=min(machine.max_blocks, num_blocks))
