"""What one server does about the shared plan: a state machine without I/O, for the live server and the simulator alike.

```
 watching ──a plan has a move of this server──▶ waiting ──its moment comes, the plan still has it──▶ claimed
    ▲  ▲                                          │                                                    │
    │  └──────────the plan has it no more─────────┴────────────────────────────────────────────────────┤
    │                                                            looks once more, the plan still has it ▼
    └────────────────────────────arrived, or failed─────────────────────────────────────────────── moving
```

Servers whose views differ may want the same place. So a server waits, longer the later its move is in the plan, and
then announces that it wants the new span, while it still serves the old one. Others count it where it goes, and count
on it no longer where it was, but for blocks that it keeps. It looks at a fresh view, and if another server with a lower
peer id claims at the same time, that claim counts and its own does not: what is left of the plan then decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias

from shoal.policy.machines.fleet import is_quiet
from shoal.policy.machines.lifetime import Lifetimes
from shoal.policy.machines.machine import Machine
from shoal.policy.placement.plan import Move, plan_moves
from shoal.spans import Span

PLAN_EVERY = 10.0
"""Seconds between two plans of a server, at least."""
HOLE_PLAN_EVERY = 1.0
"""The same while blocks have no server: clients are waiting for them."""
PLAN_ANYWAY = 120.0
"""Seconds after which a server plans again although nothing changed that it noticed."""
QUIET_PLAN_ANYWAY = 3600.0
"""The same in a quiet swarm that has nothing left to do: it took seconds to find that out."""
WAIT_PER_RANK = 2.0
"""Seconds that a server waits for each move before its own in the plan."""
CLAIM_SECONDS = 5.0
"""Seconds from a claim to the second look: twice what a claim takes at most to be seen by others. So of two servers
that claim without seeing each other, the first sees the second before it goes."""
HOLE_CLAIM_SECONDS = 1.5
"""The same for a claim of blocks that no server holds: clients are waiting for them."""
REST_SECONDS = 120.0
"""Seconds after a move in which a server moves again only to fill a hole."""

Planner: TypeAlias = Callable[[Sequence[Machine], int, float, Lifetimes | None], tuple[Move, ...]]
"""Makes plans of machines, the number of blocks, the time, and lifetimes. A simulator passes one that remembers."""


def shared_plan(
    machines: Sequence[Machine], num_blocks: int, now: float, lifetimes: Lifetimes | None
) -> tuple[Move, ...]:
    """The plan that all servers make, without a memory: the planner of live servers."""
    return plan_moves(machines, num_blocks, now=now, lifetimes=lifetimes)


class Phase(StrEnum):
    WATCHING = "watching"
    WAITING = "waiting"  # its move is in the plan; servers whose moves come before it go first
    CLAIMED = "claimed"  # it announces that it wants the new span, and looks once more before it goes
    MOVING = "moving"  # it hands its sessions over and loads the new span


@dataclass(frozen=True)
class Mover:
    """Whether and where the server `peer` moves.

    The owner calls `after_view` with what it knows at each change that it notices, and at `next_look_at` at the latest;
    while the phase is *claimed*, with what it reads afresh. It announces `claim`, and when `move` is not `None` it
    goes, and calls `arrived` or `failed`. Times are of one clock, in seconds.
    """

    peer: str
    num_blocks: int
    planner: Planner = field(default=shared_plan, compare=False)
    phase: Phase = Phase.WATCHING
    intended: Move | None = None
    next_look_at: float = -math.inf
    planned_at: float = -math.inf
    rests_until: float = -math.inf
    planned_for: int | None = None  # what the last plan was made of, as a hash
    is_settled: bool = False  # the last plan was empty, in a quiet swarm

    @property
    def move(self) -> Move | None:
        """The move to make now, or the one that is being made."""
        return self.intended if self.phase is Phase.MOVING else None

    @property
    def claim(self) -> Span | None:
        """The span to announce as wanted."""
        if self.intended is None or self.phase not in (Phase.CLAIMED, Phase.MOVING):
            return None
        return self.intended.after

    def after_view(self, machines: Sequence[Machine], *, now: float, lifetimes: Lifetimes | None = None) -> Mover:
        """What the server does after a look at the swarm.

        `machines` are those of the view; one that claims a span in addition to the one it serves occurs twice.
        """
        if self.phase is Phase.MOVING:
            return self
        if self.phase is not Phase.WATCHING:
            return self if now < self.next_look_at else self._look_again(machines, now, lifetimes)
        every = HOLE_PLAN_EVERY if _has_hole(machines, self.num_blocks) else PLAN_EVERY
        if now < self.planned_at + every:
            return replace(self, next_look_at=self.planned_at + every)
        seen = _digest(machines)
        if seen == self.planned_for and now < self._plans_anyway_at:
            return replace(self, next_look_at=self._plans_anyway_at)
        plan = self._plan(machines, now, lifetimes)
        is_settled = not plan and is_quiet(machines, now)
        planned = replace(self, planned_at=now, planned_for=seen, is_settled=is_settled)
        move = planned._own_move(plan, now)
        if move is None:
            return planned._watching()
        waiting = replace(planned, phase=Phase.WAITING, intended=move, next_look_at=now + move.rank * WAIT_PER_RANK)
        return waiting if move.rank else waiting._claimed(move, now)

    def arrived(self, *, now: float) -> Mover:
        """The move is done: the new span is online."""
        return replace(self, rests_until=now + REST_SECONDS)._watching()

    def failed(self, *, now: float) -> Mover:
        """The move was given up. The server does not try again at once."""
        return replace(self, planned_at=now, rests_until=now + REST_SECONDS)._watching()

    def _look_again(self, machines: Sequence[Machine], now: float, lifetimes: Lifetimes | None) -> Mover:
        """The moment has come: claim the span, or go, or do not."""
        looked = replace(self, planned_at=now)
        move = self._own_move(self._plan(machines, now, lifetimes), now)
        if self.phase is Phase.CLAIMED and self.intended is not None:
            going = move
            if move is None or move.after != self.intended.after:
                # others claim as well: those with higher peer ids see this server's claim, and give way
                plan = self._plan(_without_higher_claims(machines, self.peer), now, lifetimes)
                going = self._own_move(plan, now)
            if going is not None and going.after == self.intended.after:
                return replace(looked, phase=Phase.MOVING, intended=going, next_look_at=math.inf)
        return looked._watching() if move is None else looked._claimed(move, now)

    def _plan(self, machines: Iterable[Machine], now: float, lifetimes: Lifetimes | None) -> tuple[Move, ...]:
        """The plan without the server's own claim."""
        claims = _claims(machines)
        others = tuple(machine for machine in machines if machine.peer != self.peer or machine not in claims)
        return self.planner(others, self.num_blocks, now, lifetimes)

    def _own_move(self, plan: Iterable[Move], now: float) -> Move | None:
        """The move of this server in a plan."""
        move = next((move for move in plan if move.peer == self.peer), None)
        return None if move is None or (now < self.rests_until and not move.fills) else move

    def _claimed(self, move: Move, now: float) -> Mover:
        seconds = HOLE_CLAIM_SECONDS if move.fills else CLAIM_SECONDS
        return replace(self, phase=Phase.CLAIMED, intended=move, next_look_at=now + seconds)

    def _watching(self) -> Mover:
        return replace(self, phase=Phase.WATCHING, intended=None, next_look_at=self._plans_anyway_at)

    @property
    def _plans_anyway_at(self) -> float:
        return self.planned_at + (QUIET_PLAN_ANYWAY if self.is_settled else PLAN_ANYWAY)


def _claims(machines: Iterable[Machine]) -> frozenset[Machine]:
    """The entries of servers that still serve elsewhere: claims, which may be withdrawn."""
    machines = tuple(machines)
    serving = {machine.peer for machine in machines if machine.ready_at == 0.0}
    return frozenset(machine for machine in machines if machine.ready_at > 0.0 and machine.peer in serving)


def _without_higher_claims(machines: Sequence[Machine], peer: str) -> tuple[Machine, ...]:
    claims = _claims(machines)
    return tuple(machine for machine in machines if machine.peer <= peer or machine not in claims)


def _has_hole(machines: Sequence[Machine], num_blocks: int) -> bool:
    covered = {block for machine in machines for block in machine.span or ()}
    return len(covered) < num_blocks


def _digest(machines: Sequence[Machine]) -> int:
    """What a plan depends on, but for speeds that were measured again."""
    return hash(frozenset((m.peer, m.span, m.ready_at > 0.0, m.movable, m.count) for m in machines))
