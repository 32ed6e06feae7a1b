"""Over a slow connection of the real network, tensors are packed as soon as both sides know that it is slow."""

from __future__ import annotations

import asyncio
import socket

import pytest
import torch

from shoal.net import NetworkConfig, join
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.policy.network.goodput import LARGE_BYTES, MIN_SEEN
from shoal.protocol import AnyMessage, Step, StepResult
from shoal.testing import Link
from shoal.testing.proxy_process import ProxyProcess

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
"""No step below takes this long; a test that waits for it has failed."""
SLOW = Link(bytes_per_second=1e6)
"""So slow that packing gains, however busy this machine is."""
HIDDEN = torch.randn(1, 64, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()


async def answer(stream: Stream) -> None:
    """Send each tensor back, and say in `position` whether it came packed."""
    while True:
        message, tensors = await codec.receive(stream)
        await codec.send(stream, StepResult(position=int(_is_packed(message))), {"hidden": tensors["hidden"]})


def _is_packed(message: AnyMessage) -> bool:
    (spec,) = message.tensors
    return spec.packed is not None


async def test_a_slow_connection_is_packed_in_both_directions_and_no_bit_changes() -> None:
    assert HIDDEN.nbytes * 0.6 > LARGE_BYTES  # packed, it still tells how fast the line is
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProxyProcess() as proxies:
        announced = f"/ip4/127.0.0.1/tcp/{proxies.open_proxy(port, SLOW, SLOW)}"
        server_config = NetworkConfig(host="127.0.0.1", port=port, announce=(announced,))
        async with asyncio.timeout(PATIENCE), join(server_config) as server:
            await server.transport.listen(answer)
            addresses = (f"{announced}/p2p/{server.transport.peer}",)
            async with join(NetworkConfig(initial_peers=addresses, client_mode=True)) as client:
                stream = await client.transport.open(server.transport.peer, addresses)
                seen: list[tuple[bool, bool]] = []
                while (
                    True,
                    True,
                ) not in seen:  # a receiver without a core takes the line for a fast one
                    await codec.send(stream, Step(position=0), {"hidden": HIDDEN}, packs=True)
                    result, tensors = await codec.receive(stream)
                    assert isinstance(result, StepResult)
                    assert torch.equal(tensors["hidden"], HIDDEN)
                    seen.append((bool(result.position), _is_packed(result)))
                await stream.close()
    assert seen[:MIN_SEEN] == [(False, False)] * MIN_SEEN
