"""Where a server without blocks goes: its choice in view of the others, and what remains of it beside their claims."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.peers import ServerInfo
from shoal.policy.claims import machines_in, settled, without_span
from shoal.policy.placement.joining import Placed, Rule, choose_blocks
from shoal.policy.placement.machines import Machine
from shoal.policy.view import SwarmView

GIVEN = "its operator chose them"
"""The reason of a server that was told which blocks to serve."""


@dataclass(frozen=True)
class SpanChooser:
    """Chooses spans of a model of `num_blocks` blocks by a rule. `clock` is the Unix time."""

    num_blocks: int
    rule: Rule
    clock: Callable[[], float]

    def choose(self, own: ServerInfo, view: SwarmView) -> Placed:
        """The blocks that the server `own` takes in view of all other servers. Its own record does not count."""
        now = self.clock()
        others = view.only(lambda server: server.peer != own.peer)
        return self._place(without_span(own, now=now), machines_in(others, now=now))

    def settle(self, own: ServerInfo, view: SwarmView) -> Placed:
        """The blocks that remain for `own`, whose claim is announced, beside the claims of others (`policy.claims`)."""
        return settled(own, view, choose=self._place, now=self.clock())

    def _place(self, machine: Machine, others: Sequence[Machine]) -> Placed:
        # Every server can compute what another one would choose: equal machines draw equal numbers.
        rng = random.Random(machine.peer)  # noqa: S311 - it decides between equally good spans
        return choose_blocks(machine, others, self.num_blocks, rule=self.rule, rng=rng)
