"""Swarms of real processes on this machine, whose links can be made slow and whose servers can be made to fail.

It imports `shoal.host` and the ground: the processes are asked by their command lines and ports.

with shaped_swarm(MODEL, ["0:4", "4:8"], link=Link(delay_seconds=0.05, bytes_per_second=100e6 / 8)) as swarm:
    swarm.address              # the address to join by
    swarm.servers[0].kill()    # or hang(), cut(), black_hole(), link(Link(...)) ...
"""

from __future__ import annotations

from shoal.testing.churn import Act, Event, churning, random_churn
from shoal.testing.link import Link
from shoal.testing.shaped_servers import ShapedServer, ShapedSwarm, shaped_swarm

__all__ = ["Act", "Event", "Link", "ShapedServer", "ShapedSwarm", "churning", "random_churn", "shaped_swarm"]
