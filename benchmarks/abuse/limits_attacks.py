"""Attacks on what a server keeps for its peers: streams, frames that are never finished, places in the cache."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from dataclasses import replace

import torch

from benchmarks.abuse.attacked_swarm import HIDDEN_SIZE, AttackedSwarm
from benchmarks.abuse.attacks import Attack
from benchmarks.abuse.raw_frames import raw
from shoal.net.transport import Node, Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import PROTOCOL, Open, Opened, Ping, Pong
from shoal.spans import Span

FRAME_BYTES = 255 << 20
SENT_BYTES = 24 << 20
STREAM_BYTES = 64 << 10
"""What an open stream takes in a server and its libp2p daemon."""


async def idle_streams(swarm: AttackedSwarm) -> None:
    """16 identities open 64 streams each to each server, and say nothing."""
    held: list[Stream] = []
    for attacker in await swarm.identities(16):
        for server in swarm.servers:
            for _ in range(64):
                with contextlib.suppress(StreamBroken):
                    held.append(await swarm.open(attacker, server))
    swarm.begun()
    await swarm.hold()


async def unfinished_frames(swarm: AttackedSwarm) -> None:
    """40 streams with a frame of 255 MiB each, of which 24 MiB come."""
    (attacker,) = await swarm.identities(1)
    server = swarm.servers[0]
    await asyncio.gather(*(_begin_frame(swarm, attacker, server) for _ in range(40)))
    swarm.begun()
    await swarm.hold()


async def _begin_frame(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
    """Send a header that a server has to take, and a part of its payload, for as long as the server reads."""
    await swarm.open(attacker, server)
    # beside the transport, which sends whole frames only
    daemon = attacker.transport._daemon  # type: ignore[attr-defined]
    _, _, writer = await daemon.open(server.peer, PROTOCOL)
    rows = FRAME_BYTES // (HIDDEN_SIZE * 4)
    header = raw("forward", **swarm.on_span(server)).header[:-1]
    spec = f', "tensors": [{{"name": "hidden", "dtype": "float32", "shape": [1, {rows}, {HIDDEN_SIZE}]}}]}}'
    header += spec.encode()
    writer.write(struct.pack(">IQ", len(header), rows * HIDDEN_SIZE * 4) + header)
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(20):
            for _ in range(SENT_BYTES >> 18):
                writer.write(bytes(1 << 18))
                await writer.drain()


async def idle_sessions(swarm: AttackedSwarm) -> None:
    """20 sessions that ask for pings only, and then 16 of 64 rows of one token each: all of the cache."""
    (attacker,) = await swarm.identities(1)
    server = swarm.servers[0]
    streams = [await _session(swarm, attacker, server, rows=1) for _ in range(20)]
    streams += [await _session(swarm, attacker, server, rows=64) for _ in range(16)]
    swarm.begun()
    while True:
        await asyncio.sleep(5)
        for stream in streams:
            with contextlib.suppress(StreamBroken):
                await swarm.send(stream, raw("ping"))


async def _session(swarm: AttackedSwarm, attacker: Node, server: ServerInfo, *, rows: int) -> Stream:
    stream = await swarm.open(attacker, server)
    opening = raw("open", **swarm.on_span(server), batch_size=rows, expected_length=1)
    hidden = torch.ones(rows, 1, HIDDEN_SIZE)
    with contextlib.suppress(StreamBroken):
        await swarm.send(stream, opening, raw("step", {"hidden": hidden}, position=0))
    return stream


async def working_server(swarm: AttackedSwarm) -> None:
    """A server of all blocks, the fastest by its own words, that opens sessions, says that it works, and does not."""
    (liar,) = await swarm.identities(1)
    server = swarm.servers[0]
    span = Span(0, swarm.model.num_blocks)
    num_passes = itertools.count()

    async def pretend(stream: Stream) -> None:
        while True:
            message, _ = await codec.receive(stream)
            if isinstance(message, Open):
                await codec.send(stream, Opened())
            elif isinstance(message, Ping):
                await codec.send(stream, Pong(working=True, num_passes=next(num_passes)))

    await liar.transport.listen(pretend)
    info = replace(
        server,
        peer=liar.transport.peer,
        addresses=liar.transport.addresses,
        span=span,
        decode_speed=1e6,
        prefill_speed=1e6,
    )
    await liar.directory.announce(swarm.model, info, lifetime=60)
    swarm.begun()
    while True:
        await asyncio.sleep(20)
        await liar.directory.announce(swarm.model, info, lifetime=60)


ATTACKS = (
    Attack("idle-streams", idle_streams, budget_bytes=1024 * STREAM_BYTES),
    Attack("unfinished-frames", unfinished_frames, budget_bytes=256 << 20),
    Attack("idle-sessions", idle_sessions),
    Attack("working-server", working_server),
)
