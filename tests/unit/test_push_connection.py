"""A server that cannot push says so, and tells nothing about the addresses that a client named."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shoal.net.transport import Stream, StreamBroken
from shoal.protocol import Downstream, Step
from shoal.server.rpc.pushing.push_connection import OPEN_SECONDS
from shoal.server.rpc.pushing.push_service import PushService

from . import virtual_time

LINK = "0123456789abcdef" * 2


class Network:
    """A transport that reaches no peer: after `seconds`, or never."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> Stream:
        if self._seconds is None:
            await asyncio.Event().wait()
        await asyncio.sleep(self._seconds or 0.0)
        raise StreamBroken("nothing that a client should learn")


def told_after(dial_seconds: float | None, *, step_after: float = 0.0) -> list[float]:
    """When two steps of a session are reported as unreached, in seconds from its opening."""

    async def run() -> list[float]:
        clock = asyncio.get_running_loop().time
        began, told = clock(), list[float]()
        network: Any = Network(dial_seconds)
        pushes = PushService(network)
        async with pushes.running():
            handle = pushes.handle_to(Downstream(peer="p", link=LINK, addresses=("/ip4/10.0.0.1/tcp/22",)))
            assert handle is not None
            await asyncio.sleep(step_after)
            for position in range(2):
                tensors = {"hidden": torch.ones(1, 1, 4)}
                step = Step(position=position, hops_left=1)
                handle.push(step, tensors, "raw", done=lambda sent: told.append(clock() - began))
            async with asyncio.timeout(60):
                while len(told) < 2:  # noqa: ASYNC110 - virtual time
                    await asyncio.sleep(0.01)
        return [round(each, 1) for each in told]

    return virtual_time.run(run())


@pytest.mark.parametrize("step_after", [0.0, 1.0, 5.0])
def test_an_open_port_a_closed_one_and_one_behind_a_firewall_are_told_alike(step_after: float) -> None:
    closed, open_, filtered = (told_after(seconds, step_after=step_after) for seconds in (0.0005, 0.1, None))
    assert closed == open_ == filtered
    assert closed == [OPEN_SECONDS + (step_after if step_after > OPEN_SECONDS else 0.0)] * 2
