"""One stream of one client, from its first message to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import torch

from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.protocol import (
    REQUEST_KINDS,
    Adapter,
    AdapterStored,
    AnyMessage,
    Backward,
    Close,
    Failure,
    Forward,
    Norms,
    NormsResult,
    NotCached,
    Open,
    PassResult,
    Ping,
    Pong,
    ProtocolViolation,
    Step,
)
from shoal.server.engine.engine import Engine
from shoal.server.refusals import Refused, failure_of, leaving, rejected
from shoal.server.rpc.push import PushService
from shoal.server.rpc.session_stream import SessionStream
from shoal.server.training.adapter_store import MissingFromCache
from shoal.tensors import Encoding, TensorName

log = logging.getLogger(__name__)
T = TypeVar("T")

FAILURE_SEND_SECONDS = 2.0
"""How long a client may take to hear why its stream ends."""

_ANSWER_ENCODING_FROM: dict[str, TensorName] = {"forward": "hidden", "backward": "grad"}
"""The tensor of a question whose encoding the answer has too."""

ReceivedStep = tuple[AnyMessage, dict[TensorName, torch.Tensor]]


class Handler:
    """Answers one message after another. A failure is told to the client and ends its stream, and nothing else."""

    def __init__(self, engine: Engine, links: PushService, *, idle_seconds: float) -> None:
        self._engine = engine
        self._links = links
        self._idle_seconds = idle_seconds
        self._sessions: set[SessionStream] = set()
        self._ended = asyncio.Event()
        self._leaves_at: float | None = None
        self._streams_open: set[asyncio.Task[Any]] = set()
        self._streams: Counter[str] = Counter()  # of each peer
        self._leaving = False

    async def drain(self, seconds: float) -> None:
        """Take no new sessions, ask the clients of the others to take them elsewhere, and wait so long for that."""
        self._leaves_at = asyncio.get_running_loop().time() + seconds
        if self._sessions:
            log.warning("%d sessions have %.0f s to go on elsewhere", len(self._sessions), seconds)
        async with asyncio.TaskGroup() as group:
            for session in self._sessions:
                group.create_task(_told(session, seconds))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._leaves_at):
                while self._sessions:
                    self._ended.clear()
                    await self._ended.wait()

    async def leave(self) -> None:
        """Tell every client that the server is gone, now and from now on."""
        self._leaving = True
        conversations = self._streams_open - {asyncio.current_task()}
        for stream_task in conversations:
            stream_task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        await self._links.close()

    async def __call__(self, stream: Stream) -> None:
        stream_task = asyncio.current_task()
        assert stream_task is not None
        self._streams_open.add(stream_task)
        self._streams[stream.peer] += 1
        try:
            if self._leaving:
                raise asyncio.CancelledError
            await self._serve_stream(stream)
        except asyncio.CancelledError:
            if not self._leaving:
                raise
            await _fail(stream, leaving().failure)
        except StreamBroken:
            log.debug("%s hung up", stream.peer)
        except TimeoutError:
            log.debug("%s said or read nothing for %.0f s", stream.peer, self._idle_seconds)
        except (ProtocolViolation, Refused) as refusal:
            await _fail(stream, failure_of(refusal))
        except Exception as error:  # a model's code may raise anything: this client is told, the others go on
            log.exception("a request of %s failed", stream.peer)
            await _fail(stream, failure_of(error))
        finally:
            self._streams_open.discard(stream_task)
            self._streams[stream.peer] -= 1
            if not self._streams[stream.peer]:
                del self._streams[stream.peer]
                self._engine.release(stream.peer)
            await stream.close()

    async def _serve_stream(self, stream: Stream) -> None:
        reader = MessageReader(stream)
        try:
            await self._serve_messages(stream, reader)
        finally:
            await reader.close()

    async def _serve_messages(self, stream: Stream, reader: MessageReader) -> None:
        goes_on = True
        while goes_on and not reader.is_closed:
            async with asyncio.timeout(self._idle_seconds):
                message, tensors = await reader.next()
            try:
                goes_on = await self._answer(stream, reader, message, tensors)
            except MissingFromCache as lacks:
                await self._send(stream, NotCached(adapters=lacks.adapters, kept=lacks.kept))

    async def _answer(self, stream: Stream, reader: MessageReader, message: AnyMessage, tensors: codec.Tensors) -> bool:
        """Do what a message asks for. Returns whether the stream is of further use."""
        match message:
            case Ping():
                await self._send(stream, self._pong(working=False))
            case Close():
                return False
            case Open():
                await self._hold_session(stream, message, tensors)
                return False
            case Step() if message.link is not None:
                await self._links.listen(stream, message, tensors, idle_seconds=self._idle_seconds)
                return False
            case Adapter():
                await self._engine.adapters.keep(stream.peer, message, tensors)
                await self._send(stream, AdapterStored())
            case Norms():
                norms = await self._while_answering_pings(stream, reader, self._engine.norms(message))
                await self._send(stream, NormsResult(), {"factors": norms})
            case Forward() | Backward():
                result, outcome = await self._while_answering_pings(
                    stream, reader, self._pass(stream.peer, message, tensors)
                )
                await self._send(stream, result, outcome, message.encoding_of(_ANSWER_ENCODING_FROM[message.kind]))
            case _:
                raise rejected(f"a message of kind {message.kind!r} makes no sense here")
        return True

    async def _pass(
        self, peer: str, request: Forward | Backward, tensors: codec.Tensors
    ) -> tuple[PassResult, codec.Tensors]:
        if isinstance(request, Forward):
            return PassResult(), {"hidden": (await self._engine.forward(peer, request, tensors)).to(tensors["hidden"])}
        found = await self._engine.backward(peer, request, tensors)
        answer: dict[TensorName, torch.Tensor] = {}
        if found.inputs_BTD is not None:
            answer["grad"] = found.inputs_BTD.to(tensors["grad"])
        if found.factors_N is not None:
            answer["factor_grads"] = found.factors_N
        return PassResult(unused=found.unused), answer

    async def _hold_session(self, stream: Stream, request: Open, tensors: codec.Tensors) -> None:
        if self._leaves_at is not None:
            raise leaving()
        stream_task = SessionStream(stream, self._engine, self._links, idle_seconds=self._idle_seconds)
        self._sessions.add(stream_task)
        try:
            await stream_task.run(request, tensors)
        finally:
            self._sessions.discard(stream_task)
            self._ended.set()

    async def _while_answering_pings(self, stream: Stream, reader: MessageReader, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of `work`, while pings are answered.

        Raises `StreamBroken` when the client is gone, also after his `Close`; the work is then dropped. So it is, with
        `Refused`, when he asks for something else before he is answered: what he sends must not pile up here.
        """
        computing = asyncio.create_task(work)
        try:
            while not computing.done():
                await asyncio.wait({computing, reader.receiving()}, return_when=asyncio.FIRST_COMPLETED)
                if reader.receiving().done():
                    message, _ = await reader.next()
                    if isinstance(message, Ping):
                        await self._send(stream, self._pong(working=True))
                    elif not isinstance(message, Close):
                        raise rejected(f"a message of kind {message.kind!r} before the last one is answered")
            return computing.result()
        finally:
            computing.cancel()
            await asyncio.gather(computing, return_exceptions=True)

    def _pong(self, *, working: bool) -> Pong:
        return Pong(working=working, num_passes=self._engine.num_passes)

    async def _send(
        self, stream: Stream, message: AnyMessage, tensors: codec.Tensors | None = None, encoding: Encoding = "raw"
    ) -> None:
        """Raises `TimeoutError` for a client that does not read: it would keep its room for ever."""
        async with asyncio.timeout(self._idle_seconds):
            await codec.send(stream, message, tensors, encoding)


class MessageReader:
    """What a client says, message after message. Whoever stops listening in the middle of one does not lose it."""

    def __init__(self, stream: Stream) -> None:
        self.is_closed = False  # there was a `Close`
        self._stream = stream
        self._receiving: asyncio.Task[ReceivedStep] | None = None

    def receiving(self) -> asyncio.Task[ReceivedStep]:
        """The next message's coming."""
        self._receiving = self._receiving or asyncio.create_task(codec.receive(self._stream, REQUEST_KINDS))
        return self._receiving

    async def next(self) -> ReceivedStep:
        """The next message. Raises `StreamBroken`, and `ProtocolViolation`."""
        message, tensors = await self.receiving()
        self._receiving = None
        self.is_closed |= isinstance(message, Close)
        return message, tensors

    async def close(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)


async def _told(session: SessionStream, seconds: float) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAILURE_SEND_SECONDS):
            await session.leave(seconds)


async def _fail(stream: Stream, failure: Failure) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAILURE_SEND_SECONDS):
            await codec.send(stream, failure)
