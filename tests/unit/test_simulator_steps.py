"""Clients and servers step by step: what a token takes, what a failure costs, how a twin is compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from shoal.peers import ServerInfo, ServerState
from shoal.simulator.fluid.arrangement import Scene
from shoal.simulator.fluid.rules import Never
from shoal.simulator.steps.client_view import ClientView
from shoal.simulator.steps.routing_client import LOST_SECONDS, Habits, RoutingClient, Talk, Tally
from shoal.simulator.steps.segment_server import Cores, Cost, SegmentServer, Work
from shoal.simulator.steps.traffic import Load, Traffic
from shoal.simulator.steps.training_client import TrainingClient
from shoal.simulator.steps.twin import RealRun, RealServer, RealSwarm, predict
from shoal.simulator.studies.calibrate import compare
from shoal.simulator.timeline import Timeline
from shoal.simulator.world.hardware import Hardware
from shoal.simulator.world.stays import Stay
from shoal.spans import Span

COST = Cost(per_block=0.01, per_row=0.001)
LINK = 0.05


def info(peer: str, span: Span) -> ServerInfo:
    return ServerInfo(
        peer=peer,
        span=span,
        state=ServerState.ONLINE,
        fingerprint="",
        decode_speed=1 / (0.011 * len(span)),
        prefill_speed=1 / (0.001 * len(span)),
        cache_tokens_left=1 << 20,
        dtype="bfloat16",
        quantization="none",
        version="",
    )


@dataclass
class Net:
    """Servers whose links all take the same time."""

    timeline: Timeline
    spans: dict[str, Span]
    up: dict[str, SegmentServer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for peer in self.spans:
            self.up[peer] = SegmentServer(self.timeline, COST)

    def server(self, peer: str) -> SegmentServer | None:
        return self.up.get(peer)

    def deliver(self, sender: str | None, receiver: str | None, rows: float, arrive: Callable[[], None]) -> None:
        self.timeline.after(LINK, arrive)

    def view(self, num_blocks: int = 4) -> ClientView:
        def read() -> list[ServerInfo]:
            return [info(peer, self.spans[peer]) for peer in self.up]

        view = ClientView(num_blocks, read, lambda peer: 2 * LINK, random.Random(0))
        view.refresh()
        return view

    def stop(self, peer: str, *clients: RoutingClient | TrainingClient) -> None:
        self.up.pop(peer).stop()
        for client in clients:
            client.stopped(peer)


def client_of(net: Net, talk: Talk) -> tuple[RoutingClient, Tally]:
    tally = Tally()
    client = RoutingClient(net.timeline, net, net.view(), Habits(lambda rng: talk), tally, random.Random(0))
    return client, tally


ONCE = float("inf")


def test_a_pass_reads_each_block_once_for_all_rows():
    timeline, done = Timeline(), dict[str, float]()
    server = SegmentServer(timeline, COST)

    def submit(name: str, span: Span) -> None:
        server.submit(Work(span, 1, True, lambda: done.update({name: timeline.now})))

    submit("first", Span(0, 2))  # begins at once, alone
    submit("short", Span(0, 4))
    submit("long", Span(0, 8))
    timeline.run_until(10)
    assert done["first"] == pytest.approx(2 * 0.011)
    assert done["short"] == done["long"] == pytest.approx(2 * 0.011 + 8 * 0.01 + 12 * 0.001)


def test_a_long_prompt_does_not_keep_decoding_steps_waiting():
    timeline, done = Timeline(), dict[str, float]()
    server = SegmentServer(timeline, COST)
    server.submit(Work(Span(0, 1), 10_000, False, lambda: done.update(prompt=timeline.now)))
    timeline.at(0.001, lambda: server.submit(Work(Span(0, 1), 1, True, lambda: done.update(step=timeline.now))))
    timeline.run_until(100)
    assert done["step"] < 1 < 10 < done["prompt"]


def test_servers_that_share_a_core_take_turns():
    timeline, done = Timeline(), list[float]()
    cores = Cores(timeline, 1)
    for _ in range(2):
        SegmentServer(timeline, COST, cores=cores).submit(Work(Span(0, 1), 1, True, lambda: done.append(timeline.now)))
    timeline.run_until(1)
    assert done == pytest.approx([0.011, 0.022])


def test_a_token_takes_the_passes_and_links_of_the_ring():
    net = Net(Timeline(), {"a": Span(0, 2), "b": Span(2, 4)})
    client, tally = client_of(net, Talk(10, 5, ONCE))
    client.begin()
    net.timeline.run_until(100)
    assert tally.num_tokens == 5
    assert tally.first_tokens == pytest.approx([3 * LINK + 4 * 0.01 + 4 * 10 * 0.001])
    assert tally.gaps == pytest.approx([3 * LINK + 4 * 0.011] * 4)


def test_a_lost_server_is_replaced_and_its_past_computed_again():
    net = Net(Timeline(), {"a": Span(0, 2), "b": Span(2, 4), "c": Span(2, 4)})
    client, tally = client_of(net, Talk(100, 50, ONCE))
    client.begin()
    net.timeline.run_until(2.0)
    used = next(peer for peer in ("b", "c") if peer in client.peers)
    before = tally.num_tokens
    net.stop(used, client)
    net.timeline.run_until(100)
    assert tally.num_tokens == 50
    assert tally.num_replayed - 100 in (before - 1, before)  # one answer may have been on its way
    replay = 2 * LINK + 2 * 0.01 + 2 * 0.001 * tally.num_replayed
    assert tally.recoveries == pytest.approx([replay])
    assert max(tally.gaps) >= LOST_SECONDS + replay


def test_a_client_waits_until_a_missing_block_has_a_server():
    net = Net(Timeline(), {"a": Span(0, 2), "b": Span(2, 4)})
    client, tally = client_of(net, Talk(10, 200, ONCE))
    client.begin()
    net.timeline.run_until(2.0)
    net.stop("b", client)
    net.timeline.run_until(60.0)
    stalled = tally.num_tokens
    net.up["b"] = SegmentServer(net.timeline, COST)
    net.timeline.run_until(200.0)
    assert stalled < tally.num_tokens == 200
    assert tally.num_waits > 1
    assert max(tally.gaps) > 55


def test_a_client_that_loses_all_of_its_servers_at_once_goes_on():
    net = Net(Timeline(), {"a": Span(0, 2), "b": Span(2, 4), "c": Span(0, 2), "d": Span(2, 4)})
    client, tally = client_of(net, Talk(10, 100, ONCE))
    client.begin()
    net.timeline.run_until(2.0)
    for peer in sorted(client.peers):
        net.stop(peer, client)
    net.timeline.run_until(200.0)
    assert tally.num_tokens == 100


def test_a_client_that_pauses_does_not_care_that_a_server_stops():
    net = Net(Timeline(), {"a": Span(0, 4)})
    client, tally = client_of(net, Talk(4, 3, ONCE))
    client.begin()
    net.timeline.run_until(50)
    net.stop("a", client)
    net.timeline.run_until(100)
    assert tally.num_tokens == 3
    assert tally.recoveries == []


def test_a_microbatch_goes_forward_and_back_and_begins_anew_after_a_failure():
    net = Net(Timeline(), {"a": Span(0, 2), "b": Span(2, 4), "c": Span(2, 4)})
    trainer = TrainingClient(net.timeline, net, net.view(), random.Random(0), rows=100)
    trainer.begin()
    one = 8 * LINK + 12 * 0.01 + 4 * (100 + 300) * 0.001
    net.timeline.run_until(2.5 * one)
    assert trainer.num_rows_done == 200
    net.stop("b", trainer)
    net.timeline.run_until(10 * one + 2 * LOST_SECONDS)
    assert trainer.num_rows_done > 600


def test_a_client_keeps_the_nearest_records_and_some_others():
    servers = [info(f"s{index:03d}", Span(0, 4)) for index in range(100)]
    view = ClientView(4, lambda: servers, lambda peer: float(peer[1:]), random.Random(0), kept=20)
    view.refresh()
    kept = {server.peer for server in view.view.servers}
    assert len(kept) == 20
    assert {f"s{index:03d}" for index in range(10)} <= kept
    view.lose("s000")
    view.refresh()
    assert "s000" not in {server.peer for server in view.view.servers}


def test_clients_use_a_swarm_that_changes():
    hardware = Hardware(4, ((1, 4000.0), (4, 3000.0)), 1e5, 15.0)
    stays = [Stay(0, 100 if slot == 0 else float("inf"), slot) for slot in range(6)]
    scene = Scene(8, stays, lambda slot: hardware, 300.0)
    load = Load(10, Habits(lambda rng: Talk(20, 30, 1.0)), num_places=2, num_training=1, ramp=10.0)
    counts = []
    for _ in range(2):
        traffic = Traffic(scene, Never(), load, seed=3)
        traffic.arrangement.advance(10.0)
        traffic.start()
        traffic.arrangement.advance(300.0)
        counts.append((traffic.tally.num_tokens, traffic.trainers[0].num_rows_done, len(traffic.tally.recoveries)))
    assert counts[0] == counts[1]
    assert min(counts[0][:2]) > 0


def real_swarm(num_clients: int) -> RealSwarm:
    servers = [
        RealServer(span="0:6", token_seconds=0.02, row_seconds=0.002, delay_seconds=0.03),
        RealServer(span="6:12", token_seconds=0.02, row_seconds=0.002, delay_seconds=0.03),
    ]
    run = RealRun(routes=(0,) * num_clients, prompt=32, answer=20, tokens_per_second=1.0, token_seconds=1.0)
    return RealSwarm(
        machine="a test",
        num_blocks=12,
        num_cores=2,
        row_bytes=1000,
        servers=tuple(servers),
        routes=((0, 1),),
        runs=(run,),
    )


def test_a_twin_takes_the_time_that_its_parts_add_up_to():
    swarm = real_swarm(1)
    found = predict(swarm, swarm.runs[0])
    assert found.token_seconds == pytest.approx(3 * 0.03 + 2 * 0.02)
    assert found.tokens_per_second == pytest.approx(1 / found.token_seconds)
    (compared,) = compare(swarm)
    assert compared.latency_error == pytest.approx(found.token_seconds - 1)
    assert not compared.agrees


def test_clients_of_a_twin_share_passes():
    alone, together = (predict(real_swarm(count), real_swarm(count).runs[0]) for count in (1, 8))
    assert 3 * alone.tokens_per_second < together.tokens_per_second < 8.01 * alone.tokens_per_second
