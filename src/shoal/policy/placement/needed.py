"""Which blocks machines have to go on serving, because no other machine that can be relied on serves them.

A machine that needs nothing may go anywhere. Another one may go only where it never stops serving what is needed of it:
it keeps these blocks, and has room for all blocks of both spans (`machine.kept_blocks`). B changes that are compared,
M machines, N blocks, L lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.policy.machines.fleet import Flags, Fleet, Ints
from shoal.policy.placement.score import Changes


@dataclass(frozen=True)
class Needed:
    """For each entry of a fleet, the first and the end of the blocks that are needed of it; equal if there are none."""

    fleet: Fleet
    starts: Ints  # [M]
    ends: Ints

    @classmethod
    def of(cls, fleet: Fleet, relied: Flags) -> Needed:
        """What is needed of each entry if only the machines in `relied` can be relied on. [M]"""
        num_blocks = fleet.num_blocks
        servers = np.rint(fleet.servers(relied))
        blocks = np.arange(num_blocks)
        starts, ends = np.zeros_like(fleet.starts), np.zeros_like(fleet.ends)
        serves = relied & (fleet.kept.starts == fleet.starts) & (fleet.kept.ends == fleet.ends)
        for least, rows in ((1, ~serves), (2, serves)):  # one that is relied on counts among the servers
            alone = servers < least
            following = np.minimum.accumulate(np.where(alone, blocks, num_blocks)[::-1])[::-1]
            preceding = np.maximum.accumulate(np.where(alone, blocks, -1))
            first = np.append(following, num_blocks)[fleet.starts]
            last = np.concatenate(([-1], preceding))[fleet.ends]
            some = rows & (first < fleet.ends)
            starts, ends = np.where(some, first, starts), np.where(some, last + 1, ends)
        return cls(fleet, starts, ends)

    def allows(self, changes: Changes) -> Flags:
        """Whether the machine of each change goes on serving what is needed of it. [B]"""
        rows = changes.rows
        return self._allows(rows, changes.starts, changes.ends)

    def places(self, rows: Ints, max_length: int) -> Flags:
        """The same for all places of these entries, by length from 1 on and start. [rows, L, N]"""
        starts = np.arange(self.fleet.num_blocks)[None, None, :]
        ends = starts + np.arange(1, max_length + 1)[None, :, None]
        return self._allows(rows[:, None, None], starts, ends)

    def _allows(self, rows: Ints, starts: Ints, ends: Ints) -> Flags:
        fleet = self.fleet
        kept = (starts <= self.starts[rows]) & (self.ends[rows] <= ends)
        room = np.maximum(ends, fleet.ends[rows]) - np.minimum(starts, fleet.starts[rows])
        allowed: Flags = (self.starts[rows] == self.ends[rows]) | (
            kept & (room <= fleet.kinds.longest[fleet.kind[rows]])
        )
        return allowed
