"""The quick shortest path finds the same routes as the slow one, whatever the swarm looks like."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.peers import ServerInfo, short
from shoal.policy.routing.costs import Costs, Measured, Needs
from shoal.policy.routing.shortest import shortest
from shoal.policy.view import SwarmView
from shoal.spans import Span

from .slow_shortest import slow_shortest
from .test_routing import server

NEEDS = (Needs(), Needs(session=False), Needs(prompt_tokens=500, num_steps=20, dtype="float32"), Needs(head=True))


def random_swarm(number: int, num_blocks: int, rng: random.Random, *, equal: bool) -> SwarmView:
    """Servers anywhere that hold every block twice at least. With `equal`, many cost the same."""
    peers = [f"12D3KooW{index:012d}" for index in range(number)]
    servers: list[ServerInfo] = []
    for index, peer in enumerate(peers):
        length = rng.randint(1, max(1, num_blocks // rng.choice((1, 3, 8))))
        start = rng.randint(0, num_blocks - length)
        span = f"0:{num_blocks}" if index < 2 else f"{start}:{start + length}"
        speed = rng.choice((5.0, 50.0)) if equal else rng.lognormvariate(3.0, 1.5)
        links = {
            short(rng.choice(peers)): rng.choice((0.01, 0.1)) if equal else rng.uniform(0.001, 0.4) for _ in range(8)
        }
        made = server(peer, span, speed, head=index < 2 or rng.random() < 0.3, to=links)
        servers.append(replace(made, queue_length=rng.choice((0, 0, 3)), dtype=rng.choice(("float32", "bfloat16"))))
    rng.shuffle(servers)
    return SwarmView(num_blocks, tuple(servers))


def random_knowledge(view: SwarmView, rng: random.Random, *, equal: bool) -> Measured:
    peers = [each.peer for each in view.servers]
    some = [peer for peer in peers if rng.random() < 0.5]
    return Measured(
        {peer: rng.choice((0.01, 0.2)) if equal else rng.uniform(0.001, 0.5) for peer in some},
        {peer: rng.uniform(0.5, 8.0) for peer in some[::7]},
        frozenset((rng.choice(peers), rng.choice(peers)) for _ in range(len(peers) // 4)),
        {peer: rng.uniform(0.0, 0.5) for peer in some[::9]},
    )


@pytest.mark.parametrize("equal", [False, True], ids=["all-differ", "many-ties"])
@given(st.integers(2, 60), st.integers(1, 24), st.integers(0, 1 << 30), st.sampled_from(NEEDS), st.booleans())
def test_the_quick_path_is_the_slow_path(
    equal: bool, number: int, num_blocks: int, seed: int, needs: Needs, part: bool
):
    rng = random.Random(seed)
    view = random_swarm(number, num_blocks, rng, equal=equal)
    costs = Costs(needs, random_knowledge(view, rng, equal=equal))
    start = rng.randrange(num_blocks) if part else 0
    ends: dict[str, ServerInfo | None] = {}
    if part:
        ends = {"upstream": rng.choice(view.servers), "downstream": rng.choice(view.servers)}
    if part and needs.head:
        ends["downstream"] = None
    span = Span(start, num_blocks)
    assert shortest(view, span, costs, **ends) == slow_shortest(view, span, costs, **ends)


@pytest.mark.parametrize("needs", NEEDS)
def test_the_links_of_all_servers_at_once_are_those_of_each_pair(needs: Needs):
    rng = random.Random(1)
    view = random_swarm(40, 8, rng, equal=False)
    costs = Costs(needs, random_knowledge(view, rng, equal=False))
    links = costs.links(view.servers)
    assert [[costs.link(one, other) for other in view.servers] for one in view.servers] == links.tolist()


@pytest.mark.parametrize("needs", NEEDS[:2])
def test_a_path_through_three_hundred_servers_is_the_slow_path(needs: Needs):
    rng = random.Random(2)
    view = random_swarm(300, 40, rng, equal=False)
    costs = Costs(needs, random_knowledge(view, rng, equal=False))
    span = Span(0, 40)
    assert shortest(view, span, costs) == slow_shortest(view, span, costs)
