"""Which servers a server measures its round trips to."""

from __future__ import annotations

import random
from dataclasses import replace

from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.peers import MAX_NEIGHBORS, ModelInfo, ServerState, short
from shoal.policy.nearest import EXPLORED, choose_neighbors, may_be_next
from shoal.policy.view import SwarmView
from shoal.protocol import REQUEST_KINDS, Ping, Pong
from shoal.server.neighbors import NeighborMonitor

from . import virtual_time
from .test_routing import server

MODEL = ModelInfo(key="llama-12x64-0a1b2c3d", name="m", family="llama", num_blocks=12)
ME = server("me", "4:8")


def test_a_server_can_be_next_if_its_span_continues_this_one_or_is_continued_by_it():
    assert all(may_be_next(ME, server("other", span)) for span in ("8:12", "6:12", "5:9", "0:4", "2:6", "3:7"))
    assert not any(may_be_next(ME, server("other", span)) for span in ("4:8", "5:7", "0:12", "9:12", "0:3"))


def test_servers_with_different_weights_are_never_neighbors():
    assert not may_be_next(ME, replace(server("other", "8:12"), fingerprint="g"))


def test_neighbors_are_other_servers_that_are_online():
    gone = server("gone", "8:12", state=ServerState.LEAVING)
    view = SwarmView(12, (ME, gone, server("next", "8:12"), server("far", "10:12")))
    assert [each.peer for each in choose_neighbors(view, ME, {}, random.Random(0))] == ["next"]


def test_the_nearest_servers_are_measured_again_and_some_others_are_tried():
    others = [server(f"n{index}", "8:12") for index in range(40)]
    known = {f"n{index}": 0.001 * index for index in range(20)}
    chosen = [each.peer for each in choose_neighbors(SwarmView(12, (ME, *others)), ME, known, random.Random(0))]
    nearest = MAX_NEIGHBORS - EXPLORED
    assert len(set(chosen)) == MAX_NEIGHBORS
    assert chosen[:nearest] == [f"n{index}" for index in range(nearest)]
    assert not any(peer in known for peer in chosen[nearest:])


def test_a_far_server_is_measured_again_when_all_others_have_been_tried():
    others = [server(f"n{index}", "8:12") for index in range(20)]
    known = {each.peer: 0.1 for each in others}
    assert len(choose_neighbors(SwarmView(12, (ME, *others)), ME, known, random.Random(0))) == MAX_NEIGHBORS


def test_a_server_says_which_neighbors_did_not_answer_it_and_only_those():
    async def scene() -> tuple[str, ...]:
        network = MemoryNetwork()
        nodes = {name: network.node(name) for name in ("me", "next", "far", "elsewhere")}
        for name, span in (("next", "8:12"), ("far", "8:12"), ("elsewhere", "4:8")):
            await nodes[name].directory.announce(MODEL, server(name, span), lifetime=300)
            if name == "next":
                await nodes[name].transport.listen(_answers_pings)
        monitor = NeighborMonitor(nodes["me"], MODEL, lambda: ME, every_seconds=20.0)
        try:
            await monitor.measure()
            return monitor.unreached
        finally:
            await network.close()

    assert virtual_time.run(scene()) == (short("far"),)


async def _answers_pings(stream: Stream) -> None:
    while isinstance((await codec.receive(stream, REQUEST_KINDS))[0], Ping):
        await codec.send(stream, Pong(num_passes=0, queue_length=0, cache_tokens_left=0))
