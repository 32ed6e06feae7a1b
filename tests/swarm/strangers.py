"""Servers that announce much, answer pings and compute nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ServerInfo, ServerState
from shoal.protocol import Adapter, AdapterStored, Open, Opened, Ping, Pong
from shoal.spans import Span

from .schedules.bed import Bed
from .schedules.oracle import FINGERPRINT, MODEL


async def says_nothing(stream: Stream) -> None:
    """A port that accepts."""
    await asyncio.Event().wait()


async def opens_nothing(stream: Stream) -> None:
    """Says that it works, and answers nothing else."""
    try:
        while True:
            if isinstance((await codec.receive(stream))[0], Ping):
                await codec.send(stream, Pong(working=True))
    except StreamBroken:
        pass


async def computes_nothing(stream: Stream) -> None:
    """Opens sessions, stores adapters, says that it works and makes progress, and answers no step and no pass."""
    num_passes = 0
    try:
        while True:
            message, _ = await codec.receive(stream)
            if isinstance(message, Open):
                await codec.send(stream, Opened())
            elif isinstance(message, Adapter):
                await codec.send(stream, AdapterStored())
            elif isinstance(message, Ping):
                num_passes += 1
                await codec.send(stream, Pong(working=True, num_passes=num_passes))
    except StreamBroken:
        pass


async def liar(bed: Bed, name: str, span: str, behaviour: Callable[[Stream], Awaitable[None]]) -> None:
    """A server that announces the highest speed, and behaves like that."""
    node = bed.network.node(name)
    await node.transport.listen(behaviour)
    info = ServerInfo(
        peer=name,
        span=Span.parse(span),
        state=ServerState.ONLINE,
        fingerprint=FINGERPRINT,
        decode_speed=1e9,
        prefill_speed=1e9,
        cache_tokens_left=10_000,
        dtype="float32",
        quantization="none",
        version="0",
    )
    await node.directory.announce(MODEL, info, lifetime=300.0)
