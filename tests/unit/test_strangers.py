"""Which ways in answer, and how long a user waits for those that do not."""

from __future__ import annotations

import asyncio
import math

import pytest

from shoal.net.libp2p.daemon import DaemonFailed
from shoal.net.libp2p.strangers import answering

from .virtual_time import run

NEAR, FAR, FARTHER, SILENT, CLOSED = "/near", "/far", "/farther", "/silent", "/closed"
SECONDS = {NEAR: 0.1, FAR: 1.5, FARTHER: 4.0, SILENT: math.inf, CLOSED: 0.05}


async def peer_at(address: str) -> str:
    await (asyncio.Event().wait() if address == SILENT else asyncio.sleep(SECONDS[address]))
    if address == CLOSED:
        raise DaemonFailed("connection refused")
    return "QmPeer"


@pytest.mark.parametrize(
    ("ways", "answer", "seconds"),
    [
        ([NEAR], [NEAR], 0.1),
        ([SILENT], [], 8.0),
        ([CLOSED], [], 0.05),
        ([CLOSED, SILENT], [], 8.0),
        ([SILENT, NEAR, CLOSED], [NEAR], 2.0),
        ([FAR, SILENT, NEAR], [FAR, NEAR], 2.0),
        ([FARTHER, FAR, SILENT], [FARTHER, FAR], 4.5),
        ([FARTHER, SILENT], [FARTHER], 8.0),
        ([], [], 0.0),
    ],
)
def test_a_way_in_that_is_silent_is_not_waited_for_long_once_another_has_answered(
    ways: list[str], answer: list[str], seconds: float
) -> None:
    async def timed() -> tuple[tuple[str, ...], float]:
        found = await answering(peer_at, ways, seconds=8.0)
        return found, asyncio.get_running_loop().time()

    found, took = run(timed())
    assert found == tuple(f"{way}/p2p/QmPeer" for way in answer)
    assert took == pytest.approx(seconds)


def test_the_doctor_waits_for_all_since_it_says_which_are_silent() -> None:
    ways = [NEAR, FARTHER, SILENT]
    found = run(answering(peer_at, ways, seconds=8.0, waits_for_all=True))
    assert found == ("/near/p2p/QmPeer", "/farther/p2p/QmPeer")
    assert run(answering(peer_at, ways, seconds=8.0)) == ("/near/p2p/QmPeer",)
