"""A port of the router that leads to this machine, from a router on loopback that speaks UPnP."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Iterator

import pytest

from shoal.cli import run
from shoal.net import NetworkConfig, join
from shoal.net.port_mapping import ATTEMPTS, LEASE_SECONDS, Mapping, mapped_port

from .fake_router import FakeRouter

HERE = "127.0.0.1"
SECONDS = 30.0

pytestmark = pytest.mark.anyio


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    yield router
    router.close()


async def test_the_router_leads_the_same_port_to_this_machine_until_the_end(router: FakeRouter) -> None:
    async with mapped_port(31337, interface=HERE) as mapping:
        assert mapping == Mapping("40.7.0.2", 31337)
        assert mapping.address == "/ip4/40.7.0.2/tcp/31337"
        assert router.ports == {31337: (HERE, 31337)}
        assert router.asked == [LEASE_SECONDS]
    assert router.ports == {}


async def test_a_port_that_leads_to_another_machine_stays_its_own(router: FakeRouter) -> None:
    router.ports = {31337: ("192.168.1.9", 31337)}
    async with mapped_port(31337, interface=HERE) as mapping:
        assert mapping == Mapping("40.7.0.2", 31338)
    assert router.ports == {31337: ("192.168.1.9", 31337)}


async def test_the_own_port_of_a_run_that_crashed_is_used_again(router: FakeRouter) -> None:
    router.ports = {31337: (HERE, 31337)}
    async with mapped_port(31337, interface=HERE) as mapping:
        assert mapping == Mapping("40.7.0.2", 31337)


async def test_a_mapping_is_renewed(router: FakeRouter) -> None:
    async with mapped_port(31337, interface=HERE, renew_seconds=0.01):
        await asyncio.to_thread(router.wait_for_requests, 3, seconds=SECONDS)
    assert router.ports == {}


async def test_a_router_that_takes_no_lease_is_asked_without_one(router: FakeRouter) -> None:
    router.takes_leases = False
    async with mapped_port(31337, interface=HERE) as mapping:
        assert mapping == Mapping("40.7.0.2", 31337)
    assert router.asked == [LEASE_SECONDS, 0]
    assert router.ports == {}


@pytest.mark.parametrize("address", ["192.168.7.2", "100.64.0.9", "", "nonsense"])
async def test_a_router_without_a_public_address_is_of_no_use(
    router: FakeRouter, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    router.address = address
    with caplog.at_level(logging.WARNING):
        async with mapped_port(31337, interface=HERE) as mapping:
            assert mapping is None
    assert router.ports == {}
    assert "no port of the router leads to this machine" in caplog.text


async def test_a_router_without_a_free_port_is_told(router: FakeRouter, caplog: pytest.LogCaptureFixture) -> None:
    router.ports = dict.fromkeys(range(31337, 31337 + ATTEMPTS), ("192.168.1.9", 1))
    with caplog.at_level(logging.WARNING):
        async with mapped_port(31337, interface=HERE) as mapping:
            assert mapping is None
    assert "other machines have the ports up to 31344" in caplog.text


async def test_without_such_a_router_there_is_a_line_in_the_log_and_no_mapping(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        async with mapped_port(31337, interface=HERE) as mapping:
            assert mapping is None
    assert "no port of the router leads to this machine" in caplog.text


async def test_a_peer_announces_the_port_of_its_router_beside_its_own_addresses(router: FakeRouter) -> None:
    async with join(NetworkConfig(host=HERE, upnp=True)) as node:
        ((port, place),) = router.ports.items()
        assert place == (HERE, port)
        of_router, own = node.transport.addresses
        assert of_router == f"/ip4/40.7.0.2/tcp/{port}/p2p/{node.transport.peer}"
        assert own == f"/ip4/{HERE}/tcp/{port}/p2p/{node.transport.peer}"
    assert router.ports == {}


def test_without_the_library_the_option_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "miniupnpc" else find(name, *more)
    )
    assert run(["dht", "--upnp"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: --upnp needs the package miniupnpc"
    assert hint == "hint: install it: pip install miniupnpc"
