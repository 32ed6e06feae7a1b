"""What a server announces about what it could hold and compute."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.model.linear.quantization import Quantization
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.memory import MemoryNetwork
from shoal.net.records import Announcement
from shoal.peers import Capacity, ModelInfo, ServerInfo, ServerState
from shoal.policy.view import SwarmView
from shoal.server.config import ServerConfig
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.measuring.pass_timer import BATCH_SIZES, PassTimer
from shoal.server.placing.description import assumed_capacity
from shoal.server.server import serve
from shoal.spans import Span

from .tiny_models import NUM_BLOCKS, tiny_config, tiny_model

pytestmark = pytest.mark.anyio

WHOLE = Span(0, NUM_BLOCKS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    # However busy this machine is, it is measured once, and what it has shown is kept.
    monkeypatch.setattr("shoal.server.measured_speed.MAX_SPREAD", float("inf"))
    monkeypatch.setattr("shoal.server.measured_speed.MIN_CPU_FRACTION", 0.0)
    monkeypatch.setattr("shoal.server.measuring.pass_timer.MAX_BATCH_SECONDS", float("inf"))


@pytest.fixture
def config(folder: Path) -> ServerConfig:
    """A server that chooses its blocks among 4."""
    return ServerConfig(model=str(folder), dtype="float32", cache_tokens=4096)


async def announced(config: ServerConfig) -> list[ServerInfo]:
    """What a server announces, in this order."""
    node, found = MemoryNetwork().node("s0"), list[ServerInfo]()
    announce = node.directory.announce

    async def note(model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        Announcement.of(model, replace(info, addresses=()), expires=lifetime)  # it fits into a record
        found.append(info)
        await announce(model, info, lifetime=lifetime)

    node.directory.announce = note  # type: ignore[method-assign]
    async with serve(config, node):
        pass
    return found


async def joining_and_online(config: ServerConfig) -> tuple[ServerInfo, ServerInfo]:
    """What a server announces last while it loads, and first when it serves."""
    found = await announced(config)
    states = [info.state for info in found]
    index = states.index(ServerState.ONLINE)
    assert set(states[:index]) == {ServerState.JOINING}
    return found[index - 1], found[index]


def capacity_of(info: ServerInfo) -> Capacity:
    assert info.capacity is not None
    return info.capacity


async def test_a_server_announces_how_fast_it_would_be_with_each_length_of_span(config: ServerConfig) -> None:
    _, online = await joining_and_online(config)
    capacity = capacity_of(online)
    assert capacity.max_blocks == 4
    assert [length for length, _ in capacity.block_speeds][:: len(capacity.block_speeds) - 1] == [1, 4]
    assert online.decode_speed is not None
    assert all(speed > 0 for _, speed in capacity.block_speeds)
    assert capacity.network_speed is None, "it is alone"
    assert capacity.on_disk == (Span(0, 4),)
    assert 0 < capacity.disk_seconds == capacity.load_seconds < 60


async def test_the_options_of_a_server_bound_what_it_announces(config: ServerConfig) -> None:
    _, bounded = await joining_and_online(replace(config, num_blocks=2))
    assert (capacity_of(bounded).max_blocks, bounded.pinned) == (2, False)
    assert capacity_of(bounded).block_speeds[-1][0] == 2
    _, pinned = await joining_and_online(replace(config, blocks=Span(1, 4)))
    assert (capacity_of(pinned).max_blocks, pinned.pinned) == (3, True)


async def test_a_server_that_starts_again_announces_what_it_knows_while_it_loads(config: ServerConfig) -> None:
    before = time.time()
    joining, first = await joining_and_online(config)
    assert capacity_of(joining) == assumed_capacity(4, SwarmView(4))
    joining, second = await joining_and_online(config)
    known, now = capacity_of(joining), capacity_of(first)
    assert known.max_blocks == now.max_blocks
    assert (known.disk_seconds, known.on_disk) == (now.disk_seconds, now.on_disk)
    assert joining.ready_at is not None
    assert second.ready_at is None
    assert joining.up_since == second.up_since
    assert second.up_since is not None
    assert before <= second.up_since <= joining.ready_at


async def test_a_server_says_where_it_is_if_its_operator_has_named_the_place(config: ServerConfig) -> None:
    zones = [{info.zone for info in await announced(replace(config, zone=zone))} for zone in ("cellar", "", None)]
    assert zones == [{"cellar"}, {""}, {""}]


async def test_neighbors_measure_their_networks_when_they_are_online(config: ServerConfig) -> None:
    network = MemoryNetwork()
    halves = [replace(config, blocks=blocks, announce_seconds=0.05) for blocks in (Span(0, 2), Span(2, 4))]
    async with serve(halves[0], network.node("s0")), serve(halves[1], network.node("s1")):

        def speeds() -> list[float | None]:
            return [None if info.capacity is None else info.capacity.network_speed for _, info in network.announced()]

        async with asyncio.timeout(60):
            while None in speeds():  # noqa: ASYNC110 - nothing tells when it comes to hold
                await asyncio.sleep(0.01)


# Which passes are timed.


def timed(model_type: str, tmp_path: Path, *, num_pages: int, span: Span = WHOLE) -> list[int]:
    """The sizes of the batches that are timed on a tiny model of a family."""
    model = tiny_model(tiny_config(model_type))
    model.save_pretrained(tmp_path / model_type)
    body = load_body(Checkpoint.open(tmp_path / model_type), span, dtype=torch.float32, quantization=Quantization.NONE)
    cache = PagedCache(body, cache_shapes(body), num_pages)
    compute = pass_over(body, cache)
    timer = PassTimer(body, compute, num_pages=num_pages, state_pages=cache.state_pages, check=lambda: None)
    measurement = timer()
    assert measurement.profile.num_blocks == len(span)
    return [size for size, _ in measurement.batches]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3", "bloom"])
def test_batches_are_timed_as_far_as_there_are_pages_for_them(model_type: str, tmp_path: Path) -> None:
    assert timed(model_type, tmp_path, num_pages=40)[:2] == [1, BATCH_SIZES[0]]
    assert timed(model_type, tmp_path, num_pages=15) == [1]
    assert timed(model_type, tmp_path, num_pages=1, span=Span(1, 2)) == [1]


def test_as_many_sessions_are_timed_together_as_there_are_pages_for_their_states(tmp_path: Path) -> None:
    assert timed("mamba", tmp_path, num_pages=60)[:2] == [1, BATCH_SIZES[0]]
    assert timed("mamba", tmp_path, num_pages=40) == [1]
