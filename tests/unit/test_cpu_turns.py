"""Servers that share a machine, each with files of its own as processes have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.server.engine import cpu_turns as module
from shoal.server.engine.cpu_turns import CpuTurns
from shoal.server.executor import Executor

pytestmark = pytest.mark.anyio


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[CpuTurns]]:
    executors = [Executor() for _ in range(3)]
    cores = [CpuTurns(executor, tmp_path / "turns") for executor in executors]
    yield cores
    for executor, each in zip(executors, cores, strict=True):
        executor.close()
        each.close()


async def compute(cores: CpuTurns, name: str, log: list[str], enough: asyncio.Event | None = None) -> None:
    async with cores.turn():
        log.append(f"{name} begins")
        await (enough.wait() if enough else asyncio.sleep(0))
        log.append(f"{name} ends")


async def test_one_pass_ends_before_the_next_one_begins(servers: list[CpuTurns]) -> None:
    log: list[str] = []
    await asyncio.gather(*(compute(cores, str(index), log) for index, cores in enumerate(servers) for _ in range(3)))
    assert len(log) == 18
    assert all(log[i].split()[0] == log[i + 1].split()[0] for i in range(0, 18, 2))
    assert any(cores.contended for cores in servers)


async def test_a_wait_that_is_given_up_leaves_the_turn_to_others(servers: list[CpuTurns]) -> None:
    log, enough = list[str](), asyncio.Event()
    first = asyncio.create_task(compute(servers[0], "first", log, enough))
    second = asyncio.create_task(compute(servers[1], "second", log))
    await asyncio.sleep(0)
    second.cancel()
    enough.set()
    await first
    await compute(servers[2], "third", log)
    assert log == ["first begins", "first ends", "third begins", "third ends"]


async def test_a_server_that_is_stopped_in_its_turn_does_not_stop_the_others(
    servers: list[CpuTurns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.01)
    log: list[str] = []
    async with servers[0].turn():
        await compute(servers[1], "other", log)
    assert log == ["other begins", "other ends"]
