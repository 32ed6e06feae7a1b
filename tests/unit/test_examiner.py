"""A peer that is asked to dial another one back dials what it has checked, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from shoal.net.identity import Identity
from shoal.net.libp2p.reach.examiner import Examiner
from shoal.net.memory import MemoryNetwork
from shoal.net.wire import codec
from shoal.protocol import DialBack, DialedBack

from . import virtual_time

PEER = Identity.temporary().peer
PUBLIC, PUBLIC_6, PRIVATE, OWN = "9.9.9.9", "2620:fe::9", "192.168.0.1", "127.0.0.1"


class Dials:
    """Stands for the daemon: it notes what it is to dial, and reaches everything."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    async def reached(self, peer: str, addresses: Sequence[str]) -> list[bool]:
        assert peer == PEER
        self.addresses += addresses
        return [True for _ in addresses]


def examined(*addresses: str, names: dict[str, list[list[str]]]) -> tuple[list[str], tuple[bool, ...]]:
    """What is dialled for these addresses of a stranger, and what it is told. `names` lead elsewhere at each look."""

    async def look_up(host: str, port: None) -> list[tuple[Any, ...]]:
        return [(None, None, None, "", (address, 0)) for address in names[host].pop(0)]

    async def scene() -> tuple[list[str], tuple[bool, ...]]:
        asyncio.get_running_loop().getaddrinfo = look_up  # type: ignore[method-assign, assignment]
        dials, network = Dials(), MemoryNetwork()
        examiner = Examiner(cast(Any, dials), relays=lambda: False)
        await network.node("examiner").transport.listen(examiner)
        stream = await network.node(PEER).transport.open("examiner")
        await codec.send(stream, DialBack(addresses=tuple(f"{each}/tcp/31337/p2p/{PEER}" for each in addresses)))
        answer, _ = await codec.receive(stream)
        await network.close()
        assert isinstance(answer, DialedBack)
        return dials.addresses, answer.reached

    return virtual_time.run(scene())


def test_a_name_is_looked_up_once_and_what_was_checked_is_dialled():
    dialled, told = examined("/dns4/rebinding.example", names={"rebinding.example": [[PUBLIC], [PRIVATE]]})
    assert dialled == [f"/ip4/{PUBLIC}/tcp/31337/p2p/{PEER}"]
    assert told == (True,)


def test_of_a_name_one_address_of_each_version_is_dialled():
    both = [PUBLIC_6, PUBLIC, "8.8.8.8"]
    dialled, told = examined("/dns/both.example", "/dns6/both.example", names={"both.example": [both, both]})
    assert sorted(set(dialled)) == sorted(
        [f"/ip4/{PUBLIC}/tcp/31337/p2p/{PEER}", f"/ip6/{PUBLIC_6}/tcp/31337/p2p/{PEER}"]
    )
    assert told == (True, True)


@pytest.mark.parametrize("private", [PRIVATE, OWN, "10.1.2.3", "fe80::1", "::1"])
def test_a_stranger_cannot_have_private_addresses_dialled(private: str):
    kind = "ip6" if ":" in private else "ip4"
    addresses = f"/{kind}/{private}", "/dns/home.example", f"/ip4/{PUBLIC}"
    dialled, told = examined(*addresses, names={"home.example": [[PUBLIC, private]]})
    assert dialled == [f"/ip4/{PUBLIC}/tcp/31337/p2p/{PEER}"]
    assert told == (False, False, True)
