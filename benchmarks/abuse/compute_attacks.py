"""Attacks on the time of a server: one attacker that asks for as much compute as it can get, over 60 streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import torch

from benchmarks.abuse.attacked_swarm import HIDDEN_SIZE, AttackedSwarm
from benchmarks.abuse.attacks import Attack
from benchmarks.abuse.raw_frames import Raw, raw
from shoal.net.transport import Node, Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import Failure, Opened, StepResult
from shoal.server.training.adapter_store import LAYER_BYTES

NUM_STREAMS = 60
BEGIN_SECONDS = 3.0
"""After so long, all streams are at work."""
LENGTH = 1000
"""Tokens of a session: the model has room for a few more."""
RANK = 8
WAITING_BYTES = NUM_STREAMS * 2 * LENGTH * HIDDEN_SIZE * 4
"""The inputs and gradients of passes that wait, or the inputs and outputs of prompts: limits allow a GiB of them."""
SAVED_BYTES = 6 * 50 * LENGTH * HIDDEN_SIZE * 4
"""What one backward pass through six blocks saves (`shoal.server.training.saved_activations`): limits allow 2 GiB."""
ADAPTER_BYTES = NUM_STREAMS * 50 * (RANK * 2 * HIDDEN_SIZE * 4 + LAYER_BYTES)
"""The adapters that a server keeps for clients, as it counts them: limits allow a GiB."""
FAIR_SHARE = 0.5

Work = Callable[[AttackedSwarm, Node, ServerInfo], Awaitable[None]]


def _attack(work: Work) -> Callable[[AttackedSwarm], Awaitable[None]]:
    """This work, over and over, 60 times at once on each server."""

    async def for_ever(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
        while True:
            with contextlib.suppress(StreamBroken, TimeoutError):
                await work(swarm, attacker, server)
            await asyncio.sleep(0.05)

    async def run(swarm: AttackedSwarm) -> None:
        (attacker,) = await swarm.identities(1)
        async with asyncio.TaskGroup() as group:
            for server in swarm.servers:
                for _ in range(NUM_STREAMS):
                    group.create_task(for_ever(swarm, attacker, server))
            await asyncio.sleep(BEGIN_SECONDS)
            swarm.begun()

    return run


async def _answer(stream: Stream, *kinds: type[object]) -> bool:
    """Wait for an answer of one of these kinds. Returns whether the stream goes on."""
    while True:
        message, _ = await codec.receive(stream)
        if isinstance(message, (*kinds, Failure)):
            return not isinstance(message, Failure)


def _opening(swarm: AttackedSwarm, server: ServerInfo) -> Raw:
    return raw("open", **swarm.on_span(server), batch_size=1, expected_length=LENGTH)


def _hidden(num_tokens: int) -> dict[str, torch.Tensor]:
    return {"hidden": torch.randn(1, num_tokens, HIDDEN_SIZE)}


async def _decode(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
    stream = await swarm.open(attacker, server)
    try:
        await swarm.send(stream, _opening(swarm, server))
        if not await _answer(stream, Opened):
            return
        for position in range(LENGTH):
            await swarm.send(stream, raw("step", _hidden(1), position=position))
            if not await _answer(stream, StepResult):
                return
    finally:
        await stream.close()


async def _prefill(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
    stream = await swarm.open(attacker, server)
    try:
        await swarm.send(stream, _opening(swarm, server))
        if await _answer(stream, Opened):
            await swarm.send(stream, raw("step", _hidden(LENGTH), position=0))
            await _answer(stream, StepResult)
    finally:
        await stream.close()


async def _ask_again_and_again(swarm: AttackedSwarm, attacker: Node, server: ServerInfo, *frames: Raw) -> None:
    """Send frames over one stream, each when the last one is answered, until the server ends it."""
    stream = await swarm.open(attacker, server)
    try:
        while True:
            for frame in frames:
                await swarm.send(stream, frame)
                if not await _answer(stream, object):
                    return
    finally:
        await stream.close()


async def _backward(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
    tensors = {**_hidden(LENGTH), "grad": torch.randn(1, LENGTH, HIDDEN_SIZE)}
    await _ask_again_and_again(swarm, attacker, server, raw("backward", tensors, **swarm.on_span(server)))


async def _adapters(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
    layer = {"kind": "lora", "module": "self_attn.q_proj", "rank": RANK, "scaling": 2.0}
    frames = [
        raw("adapter", {"factors": torch.randn(RANK * 2 * HIDDEN_SIZE)}, block=server.span.start, layers=[layer])
        for _ in range(50)
    ]
    await _ask_again_and_again(swarm, attacker, server, *frames)


async def _pings(swarm: AttackedSwarm, attacker: Node, server: ServerInfo) -> None:
    await _ask_again_and_again(swarm, attacker, server, raw("ping"))


ATTACKS = (
    Attack("sessions", _attack(_decode), fair_share=FAIR_SHARE),
    Attack("prefills", _attack(_prefill), fair_share=FAIR_SHARE, budget_bytes=WAITING_BYTES),
    Attack("backward-passes", _attack(_backward), fair_share=FAIR_SHARE, budget_bytes=WAITING_BYTES + SAVED_BYTES),
    Attack("adapters", _attack(_adapters), fair_share=FAIR_SHARE, budget_bytes=ADAPTER_BYTES),
    Attack("pings", _attack(_pings), fair_share=FAIR_SHARE),
)
