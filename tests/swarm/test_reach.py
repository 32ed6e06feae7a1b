"""Servers that others cannot reach: they are announced as such, and count for no block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shoal import MissingBlocks
from shoal.peers import ServerState
from shoal.policy.network.reachability import Reachability

from .harness import Swarm

MakeSwarm = Callable[..., Swarm]
PROMPT = torch.tensor([[5, 17, 42, 9, 33]])


def states(swarm: Swarm) -> dict[str, ServerState]:
    """What each server announces."""
    return {record.info.peer: record.info.state for record in swarm.network.records}


def test_a_server_that_others_cannot_reach_says_so_as_soon_as_it_knows_and_clients_leave_it_out(swarm: MakeSwarm):
    swarm_ = swarm("0:4", announce_seconds=100.0)
    swarm_.call(swarm_.network.set_reach, "s0", Reachability.UNREACHABLE)
    swarm_.settle(lambda: states(swarm_) == {"s0": ServerState.UNREACHABLE})
    with pytest.raises(MissingBlocks, match="blocks 0:4 are held by s0, which other machines cannot reach"):
        swarm_.model().generate(PROMPT, max_new_tokens=1)


def test_it_is_online_again_when_relays_reach_it(swarm: MakeSwarm):
    swarm_ = swarm("0:4", announce_seconds=100.0)
    for kind, state in (
        (Reachability.UNREACHABLE, ServerState.UNREACHABLE),
        (Reachability.RELAYED, ServerState.ONLINE),
        (Reachability.UNREACHABLE, ServerState.UNREACHABLE),
        (Reachability.DIRECT, ServerState.ONLINE),
    ):
        swarm_.call(swarm_.network.set_reach, "s0", kind)
        swarm_.settle(lambda state=state: states(swarm_) == {"s0": state})
    assert swarm_.model().generate(PROMPT, max_new_tokens=2).shape == (1, 7)


def test_a_server_that_joins_takes_the_blocks_of_one_that_others_cannot_reach(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4", announce_seconds=100.0)
    swarm_.call(swarm_.network.set_reach, "s1", Reachability.UNREACHABLE)
    swarm_.settle(lambda: states(swarm_)["s1"] is ServerState.UNREACHABLE)
    joined = swarm_.start("0:1", blocks=None, num_blocks=2)
    assert str(joined.info.span) == "2:4"
