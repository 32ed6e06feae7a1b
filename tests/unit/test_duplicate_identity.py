"""Two processes with one identity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.bundled import STORIES
from shoal.errors import UserError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.identity import Identity
from shoal.net.libp2p.duplicate_identity import DuplicateIdentityWatch
from shoal.net.libp2p.identity_lock import identity_lock
from shoal.net.memory import MemoryNetwork
from shoal.net.records import Announcement
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ModelInfo, ServerState
from shoal.server.config import ServerConfig
from shoal.server.placing.setup import model_info
from shoal.server.server import serve
from shoal.spans import Span

from .test_routing import server

ME = Identity.temporary().peer
MODEL = ModelInfo("tiny-8x64-00000000", "tiny", "llama", 8)
STARTED_AT = 1e9


def test_a_copied_identity_cannot_be_used_twice_on_one_machine() -> None:
    with identity_lock(ME):
        with (
            pytest.raises(UserError, match=f"another process of this machine is the peer {ME}") as caught,
            identity_lock(ME),
        ):
            pass
        assert "--identity" in (caught.value.hint or "")
        with identity_lock(Identity.temporary().peer):
            pass
    with identity_lock(ME):
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))


@pytest.mark.anyio
@pytest.mark.parametrize("in_use", [True, False])
async def test_a_server_refuses_an_identity_that_is_in_use_but_not_its_own_after_a_crash(in_use: bool) -> None:
    network, asked = MemoryNetwork(), list[Sequence[str]]()

    async def answers_elsewhere(addresses: Sequence[str]) -> bool:
        asked.append(addresses)
        return in_use

    node = replace(network.node("s0"), answers_elsewhere=answers_elsewhere)
    other = replace(server("s0", "0:12"), addresses=("/memory/far-away",))
    await node.directory.announce(model_info(Checkpoint.open(STORIES)), other, lifetime=60)
    config = ServerConfig(model=str(STORIES), blocks=Span(0, 1), dtype="float32", cache_tokens=64)
    if in_use:
        with pytest.raises(UserError, match="another server is the peer s0 already, at /memory/far-away") as caught:
            async with serve(config, node):
                pass
        assert "--identity" in (caught.value.hint or "")
        assert [info for _, info in network.announced()] == [other], "the other server is not replaced"
    else:
        async with serve(config, node):
            assert [info.addresses for _, info in network.announced()] == [("/memory/s0",)]
    assert asked == [("/memory/far-away",)]


@pytest.mark.anyio
async def test_a_server_that_restarts_at_its_address_dials_no_other() -> None:
    async def answers_elsewhere(_: Sequence[str]) -> bool:
        raise AssertionError("the address is its own")

    network = MemoryNetwork()
    node = replace(network.node("s0"), answers_elsewhere=answers_elsewhere)
    before = replace(server("s0", "0:12"), addresses=node.transport.addresses)
    await node.directory.announce(model_info(Checkpoint.open(STORIES)), before, lifetime=60)
    async with serve(ServerConfig(model=str(STORIES), blocks=Span(0, 1), dtype="float32", cache_tokens=64), node):
        pass


def announced_by(
    peer: str,
    address: str,
    *,
    expires: float,
    state: ServerState = ServerState.ONLINE,
    up_since: float | None = None,
) -> Announcement:
    info = replace(server(peer, "0:8", state=state), addresses=(f"{address}/p2p/{peer}",), up_since=up_since)
    return Announcement.of(MODEL, info, expires=expires)


def test_a_second_server_that_started_with_the_first_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    late = STARTED_AT + MAX_LIFETIME + 1
    watch = DuplicateIdentityWatch(ME)
    with caplog.at_level(logging.WARNING, "shoal"):
        watch.record(announced_by(ME, "/ip4/10.0.0.2/tcp/1", expires=late))  # before the own announcement
        for address in "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.9/tcp/1":  # the second is a new one from the router
            watch.add_own([f"{address}/p2p/{ME}"], now=STARTED_AT)
        watch.record(announced_by(ME, "/ip4/10.0.0.1/tcp/1", expires=late))
        watch.record(announced_by(ME, "/ip4/10.0.0.2/tcp/1", expires=STARTED_AT + 60))  # from before a crash
        watch.record(announced_by(ME, "/ip4/10.0.0.2/tcp/1", expires=late, state=ServerState.LEAVING))
        watch.record(announced_by(Identity.temporary().peer, "/ip4/10.0.0.2/tcp/1", expires=late))
        assert not caplog.records
        for _ in range(3):
            watch.record(announced_by(ME, "/ip4/10.0.0.2/tcp/1", expires=late))
    (record,) = caplog.records
    assert "another server has this one's identity, at /ip4/10.0.0.2/tcp/1" in record.getMessage()


@pytest.mark.parametrize(("seconds", "is_reported"), [(-100.0, False), (3.0, False), (10.0, True)])
def test_a_server_that_came_up_later_with_this_identity_is_reported_at_once(
    seconds: float, is_reported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = DuplicateIdentityWatch(ME)
    watch.add_own([f"/ip4/10.0.0.1/tcp/1/p2p/{ME}"], now=STARTED_AT)
    with caplog.at_level(logging.WARNING, "shoal"):
        watch.record(announced_by(ME, "/ip4/10.0.0.2/tcp/1", expires=STARTED_AT + 70, up_since=STARTED_AT + seconds))
    assert bool(caplog.records) == is_reported
