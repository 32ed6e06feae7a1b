"""Progress of loading blocks, and stopping a server while it loads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.bundled import STORIES
from shoal.model.linear.quantization import Quantization
from shoal.model.loading import load_body
from shoal.model.weights import disk_cache
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.memory import MemoryNetwork
from shoal.peers import ServerInfo, ServerState
from shoal.policy.machines.speed_profile import BlockTime, SpeedProfile
from shoal.server.config import ServerConfig
from shoal.server.executor import Abandoned
from shoal.server.kv.batch import Chunk
from shoal.server.kv.session_cache import Growth
from shoal.server.measured_speed import speed_key
from shoal.server.server import serve
from shoal.server.speed_watch import Watch
from shoal.server.startup_progress import Phase, Progress
from shoal.spans import Span


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))


def test_loading_reports_the_blocks_in_order() -> None:
    reported: list[tuple[int, bool]] = []
    load_body(
        Checkpoint.open(STORIES),
        Span(2, 5),
        dtype=torch.float32,
        progress=lambda block, now: reported.append((block, now)),
    )
    assert list(dict.fromkeys(reported)) == [(2, False), (3, False), (4, False)]
    assert len(reported) > 3, "after each weight, not only after each block"


def test_loading_reports_quantization_and_reads_cached_blocks_without_it() -> None:
    for is_quantized_now in True, False:
        reported: list[tuple[int, bool]] = []
        load_body(
            Checkpoint.open(STORIES),
            Span(0, 2),
            dtype=torch.float32,
            quantization=Quantization.NF4,
            progress=lambda block, now: reported.append((block, now)),  # noqa: B023 - called before the next round
        )
        assert list(dict.fromkeys(reported)) == [(0, is_quantized_now), (1, is_quantized_now)]


def test_loading_stops_at_the_next_weight_when_progress_raises() -> None:
    reported: list[int] = []

    def stop(block: int, _: bool) -> None:
        reported.append(block)
        if len(reported) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        load_body(Checkpoint.open(STORIES), Span(0, 12), dtype=torch.float32, progress=stop)
    assert reported == [0, 0, 0]


@pytest.mark.anyio
async def test_a_server_that_is_told_to_stop_while_it_loads_says_goodbye_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, loads, goes_on = MemoryNetwork(), threading.Event(), threading.Event()
    stopped: list[type[BaseException]] = []

    def load(*_: object, progress: Callable[[int, bool], None], **__: object) -> None:
        loads.set()
        goes_on.wait()
        try:
            progress(0, True)
        except BaseException as error:
            stopped.append(type(error))
            raise

    monkeypatch.setattr("shoal.server.placing.loaded_span.load_body", load)
    config = ServerConfig(model=str(STORIES), blocks=Span(0, 12), dtype="float32")

    async def hold() -> None:
        async with serve(config, network.node("s0")):
            raise AssertionError("it serves")

    serving = asyncio.create_task(hold())
    await asyncio.to_thread(loads.wait)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)  # although the compute thread is busy
    assert serving.cancelled()
    assert [info.state for _, info in network.announced()] == [ServerState.LEAVING]
    assert not stopped
    goes_on.set()
    (thread,) = (each for each in threading.enumerate() if each.name.startswith("shoal-compute"))
    thread.join()
    assert stopped == [Abandoned]


@pytest.mark.anyio
async def test_a_server_tells_what_it_does_block_by_block() -> None:
    config = ServerConfig(model=str(STORIES), blocks=Span(3, 6), dtype="float32", cache_tokens=64)
    told: list[Progress] = []
    async with serve(config, MemoryNetwork().node("s0"), report=told.append):
        pass
    assert told == [
        Progress(Phase.OPENING),
        Progress(Phase.FINGERPRINTING),
        Progress(Phase.LOADING),
        *(Progress(Phase.LOADING, block, 3) for block in (1, 2, 3)),
        Progress(Phase.MEASURING),
        Progress(Phase.ANNOUNCING),
    ]


def block_speeds(info: ServerInfo) -> list[tuple[int, float]]:
    return [] if info.capacity is None else list(info.capacity.block_speeds)


@pytest.mark.anyio
async def test_a_server_announces_the_speed_that_its_passes_have_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[Watch] = []
    keys: list[str] = []

    def measured(*_: object, key: str, **__: object) -> SpeedProfile:
        keys.append(speed_key(key))
        disk_cache.store(keys[-1], 1)
        slow = BlockTime(0.0, 3.0)
        return SpeedProfile(1, slow, slow, 1, ((1, slow),))

    def watch(*arguments: Any, **options: Any) -> Watch:
        watches.append(Watch(*arguments, **options))
        return watches[0]

    monkeypatch.setattr("shoal.server.placing.loaded_span.Watch", watch)
    monkeypatch.setattr("shoal.server.placing.loaded_span.profile_of", measured)
    config = ServerConfig(model=str(STORIES), blocks=Span(0, 1), dtype="float32", cache_tokens=64)
    network, announced = MemoryNetwork(), asyncio.Event()

    def note(info: ServerInfo) -> ServerInfo:
        announced.set()
        return info

    network.on_announce = note
    async with serve(replace(config, announce_seconds=0.01), network.node("s0")):
        assert [disk_cache.load(key) for key in keys] == [1]
        step = Chunk(Span(0, 1), torch.zeros(1, 1, 4), None, None, 0, (), Growth((), ()), None)
        for second in range(60):
            watches[0].decoded([step], 0.05, now=float(second))
        for _ in range(2):  # one may have been under way
            announced.clear()
            await announced.wait()
        assert [info.decode_speed for _, info in network.announced()] == [pytest.approx(20.0)]
        assert [block_speeds(info) for _, info in network.announced()] == [[(1, pytest.approx(20.0))]], "so it decodes"
        assert [disk_cache.load(key) for key in keys] == [None], "what was measured is not believed at the next start"
