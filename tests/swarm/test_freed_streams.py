"""What a server held for a stream is free when the stream ends, however it ends. In virtual time.

The garbage collector, which frees circles of objects, is off: in a server it looks so rarely that memory ran out.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.protocol import Failure, Opened, PassResult, StepResult

from .intruder import Raw, raw
from .schedules.bed import Bed
from .schedules.oracle import FINGERPRINT, MODEL
from .virtual_time import run

pytestmark = pytest.mark.usefixtures("no_log_lines")

SHAPE = (1, 37, 32)
"""The shape of what the client sends, and is answered: no other tensor has it."""
SPAN = {"model": MODEL.key, "fingerprint": FINGERPRINT, "start": 0, "end": 4}


@pytest.fixture(autouse=True)
def without_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def num_tensors() -> int:
    return sum(type(each) is torch.Tensor and each.shape == SHAPE for each in gc.get_objects())


async def answered(stream: Stream, kind: type[Any]) -> None:
    while not isinstance((await codec.receive(stream))[0], kind):
        pass


async def a_session(stream: Stream) -> None:
    await send(stream, raw("open", batch_size=1, expected_length=64, **SPAN))
    await answered(stream, Opened)
    await send(stream, raw("step", {"hidden": torch.ones(SHAPE)}, position=0))
    await answered(stream, StepResult)


async def a_session_whose_step_is_wrong(stream: Stream) -> None:
    await a_session(stream)
    await send(stream, raw("step", {"hidden": torch.ones(SHAPE)}, position=999))
    await send(stream, raw("step", {"hidden": torch.ones(1, 37, 16)}, position=37))
    await answered(stream, Failure)


async def a_pass(stream: Stream) -> None:
    await send(stream, raw("forward", {"hidden": torch.ones(SHAPE)}, **SPAN))
    await answered(stream, PassResult)


async def a_pass_that_is_left(stream: Stream) -> None:
    await send(stream, raw("backward", {"hidden": torch.ones(SHAPE), "grad": torch.ones(SHAPE)}, **SPAN))
    await asyncio.sleep(0.001)


async def a_pass_that_is_refused(stream: Stream) -> None:
    await send(stream, raw("backward", {"hidden": torch.ones(SHAPE), "grad": torch.ones(1, 36, 32)}, **SPAN))
    await answered(stream, Failure)


async def send(stream: Stream, frame: Raw) -> None:
    await stream.send(frame.header, [frame.payload])


@pytest.mark.parametrize(
    "talk", [a_session, a_session_whose_step_is_wrong, a_pass, a_pass_that_is_left, a_pass_that_is_refused]
)
def test_a_stream_that_breaks_leaves_nothing(talk: Any):
    async def scene() -> None:
        async with Bed(("0:4",), cache_pages=40, drain_seconds=0.0) as bed:
            transport = bed.network.node("client").transport
            for _ in range(3):
                stream = await transport.open("s0")
                await talk(stream)
                await stream.close()
                del stream
            await asyncio.sleep(1.0)
            assert not num_tensors()
            await transport.close()

    run(scene())
