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
from shoal.net.libp2p.twin import Twins, only_here
from shoal.net.memory import MemoryNetwork
from shoal.net.records import Announcement
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ModelInfo, ServerState
from shoal.server.config import ServerConfig
from shoal.server.server import model_info, serve
from shoal.spans import Span

from .test_routing import server

ME = Identity.temporary().peer
MODEL = ModelInfo("tiny-8x64-00000000", "tiny", "llama", 8)
STARTED_AT = 1e9


def test_a_copy_of_an_identity_serves_no_second_process_of_a_machine() -> None:
    with only_here(ME):
        with (
            pytest.raises(UserError, match=f"another process of this machine is the peer {ME}") as caught,
            only_here(ME),
        ):
            pass
        assert "--identity" in (caught.value.hint or "")
        with only_here(Identity.temporary().peer):
            pass
    with only_here(ME):
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))


@pytest.mark.anyio
@pytest.mark.parametrize("lives", [True, False])
async def test_a_server_refuses_an_identity_that_serves_elsewhere_but_not_its_own_that_crashed(lives: bool) -> None:
    network, asked = MemoryNetwork(), list[Sequence[str]]()

    async def answers(addresses: Sequence[str]) -> bool:
        asked.append(addresses)
        return lives

    node = replace(network.node("s0"), answers_elsewhere=answers)
    other = replace(server("s0", "0:12"), addresses=("/memory/far-away",))
    await node.directory.announce(model_info(Checkpoint.open(STORIES)), other, lifetime=60)
    config = ServerConfig(model=str(STORIES), blocks=Span(0, 1), dtype="float32", cache_tokens=64)
    if lives:
        with pytest.raises(UserError, match="another server is the peer s0 already, at /memory/far-away") as caught:
            async with serve(config, node):
                pass
        assert "--identity" in (caught.value.hint or "")
        assert [info for _, info in network.announced()] == [other], "the other one is not hidden"
    else:
        async with serve(config, node):
            assert [info.addresses for _, info in network.announced()] == [("/memory/s0",)]
    assert asked == [("/memory/far-away",)]


@pytest.mark.anyio
async def test_a_server_that_comes_back_to_its_address_asks_nobody() -> None:
    async def answers(_: Sequence[str]) -> bool:
        raise AssertionError("the address is its own")

    network = MemoryNetwork()
    node = replace(network.node("s0"), answers_elsewhere=answers)
    before = replace(server("s0", "0:12"), addresses=node.transport.addresses)
    await node.directory.announce(model_info(Checkpoint.open(STORIES)), before, lifetime=60)
    async with serve(ServerConfig(model=str(STORIES), blocks=Span(0, 1), dtype="float32", cache_tokens=64), node):
        pass


def said_by(peer: str, place: str, *, expires: float, state: ServerState = ServerState.ONLINE) -> Announcement:
    info = replace(server(peer, "0:8", state=state), addresses=(f"{place}/p2p/{peer}",))
    return Announcement.of(MODEL, info, expires=expires)


def test_a_second_server_that_started_with_the_first_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    late = STARTED_AT + MAX_LIFETIME + 1
    twins = Twins(ME)
    with caplog.at_level(logging.WARNING, "shoal"):
        twins.record(said_by(ME, "/ip4/10.0.0.2/tcp/1", expires=late))  # we have not said yet where we are
        for place in "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.9/tcp/1":  # a new address, from the router
            twins.announces([f"{place}/p2p/{ME}"], now=STARTED_AT)
        twins.record(said_by(ME, "/ip4/10.0.0.1/tcp/1", expires=late))
        twins.record(said_by(ME, "/ip4/10.0.0.2/tcp/1", expires=STARTED_AT + 60))  # before it crashed
        twins.record(said_by(ME, "/ip4/10.0.0.2/tcp/1", expires=late, state=ServerState.LEAVING))
        twins.record(said_by(Identity.temporary().peer, "/ip4/10.0.0.2/tcp/1", expires=late))
        assert not caplog.records
        for _ in range(3):
            twins.record(said_by(ME, "/ip4/10.0.0.2/tcp/1", expires=late))
    (record,) = caplog.records
    assert "another server has this one's identity, at /ip4/10.0.0.2/tcp/1" in record.getMessage()
