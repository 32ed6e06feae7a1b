"""A peer that says whatever it likes: raw frames to a server, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.abuse.raw_frames import Raw, raw
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.protocol import AnyMessage, NormsResult, PassResult, StepResult

from .harness import Swarm

MODEL, FINGERPRINT = "@model", "@fingerprint"
"""Stand for the server's own, which a frame can only name once there is a server."""

ANSWERED = Raw(b"")
"""Not a frame: what follows is sent when the step before it is answered."""


def declaring(frame: Raw, *specs: Any) -> Raw:
    """The same payload under another declaration of its tensors."""
    return Raw(json.dumps(json.loads(frame.header) | {"tensors": list(specs)}).encode(), frame.payload)


class Intruder:
    """Opens streams to one server of a swarm, as a peer of its own."""

    def __init__(self, swarm: Swarm, server: str, *, name: str = "intruder") -> None:
        self._swarm = swarm
        self._server = server
        self.name = name
        self._transport = swarm.call(swarm.network.node, name).transport

    def open(self) -> Stream:
        return self._swarm.runtime.run(self._transport.open(self._server))

    def tell(self, stream: Stream, *frames: Raw) -> None:
        """Send frames, for as long as they are taken."""
        self._swarm.runtime.run(self._tell(stream, frames))

    def ask(self, *frames: Raw) -> list[AnyMessage]:
        """Send frames, and then a `Close`, and return every message that is answered until the server closes too."""
        return [message for message, _ in self.exchange(*frames)]

    def exchange(self, *frames: Raw) -> list[tuple[AnyMessage, codec.Tensors]]:
        """The same with the tensors of the answers."""
        stream = self.open()

        async def exchange() -> list[tuple[AnyMessage, codec.Tensors]]:
            answered = asyncio.Semaphore(0)

            async def tell() -> None:
                for frame in (*frames, raw("close")):
                    if frame is ANSWERED:
                        await answered.acquire()
                    else:
                        await self._tell(stream, [frame])

            sending = asyncio.create_task(tell())
            answers: list[tuple[AnyMessage, codec.Tensors]] = []
            with contextlib.suppress(StreamBroken):
                async with asyncio.timeout(20):
                    while True:
                        answers.append(await codec.receive(stream))
                        if isinstance(answers[-1][0], StepResult | PassResult | NormsResult):
                            answered.release()
            sending.cancel()
            await stream.close()
            await asyncio.gather(sending, return_exceptions=True)
            return answers

        return self._swarm.runtime.run(exchange())

    def hear(self, stream: Stream, num_messages: int = 1) -> list[tuple[AnyMessage, codec.Tensors]]:
        """The next so many messages on a stream, with their tensors."""

        async def hear() -> list[tuple[AnyMessage, codec.Tensors]]:
            async with asyncio.timeout(20):
                return [await codec.receive(stream) for _ in range(num_messages)]

        return self._swarm.runtime.run(hear())

    def finish(self, stream: Stream) -> list[AnyMessage]:
        """Say goodbye on a stream, and return every message that comes until the server closes it."""
        self.tell(stream, raw("close"))

        async def rest() -> list[AnyMessage]:
            answers: list[AnyMessage] = []
            with contextlib.suppress(StreamBroken):
                async with asyncio.timeout(20):
                    while True:
                        answers.append((await codec.receive(stream))[0])
            await stream.close()
            return answers

        return self._swarm.runtime.run(rest())

    async def _tell(self, stream: Stream, frames: Sequence[Raw]) -> None:
        server = self._swarm.servers[self._server]
        with contextlib.suppress(StreamBroken):
            for frame in frames:
                header = frame.header.replace(MODEL.encode(), server.model.key.encode())
                header = header.replace(FINGERPRINT.encode(), server.info.fingerprint.encode())
                await stream.send(header, [frame.payload])


def num_streams(swarm: Swarm, server: str) -> int:
    """The streams that a server serves."""
    return swarm.network.num_handlers(server)


def num_push_connections(swarm: Swarm) -> int:
    """The connections over which servers push to each other, of all servers."""
    return sum("shoal-push" in task.get_name() for task in asyncio.all_tasks(swarm.runtime.loop))


def num_sessions(swarm: Swarm, server: str) -> int:
    """The sessions that are open on a server."""
    return swarm.servers[server].engine.num_sessions
