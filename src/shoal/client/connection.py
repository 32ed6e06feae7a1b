"""One stream to one server: a question, an answer, and every way that an answer can fail to come, by name."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

import torch

from shoal.client.config import ClientConfig
from shoal.client.logits import Logits, Question
from shoal.errors import Misrouted, PeerError, RequestRejected, ServerBusy, ServerLost, UserError
from shoal.model.prefix import PAGE_TOKENS
from shoal.net import codec
from shoal.net.encodings import as_received
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.protocol import (
    MAX_PAYLOAD_BYTES,
    TENSOR_ALIGNMENT,
    Close,
    Encoding,
    Failure,
    Message,
    Open,
    Opened,
    ProtocolViolation,
    Result,
    Step,
    TensorName,
    Working,
)
from shoal.spans import ServerInfo

OPEN_SECONDS = 10.0
SLOWEST_LINK = 128 * 1024
"""Bytes per second: what is in flight over a link that is slower than this looks like silence."""
SOON = 1.0


class CannotRewind(PeerError):
    """The server cannot take its session back; it has to be sent everything again."""


class Connection:
    """Questions to one server, one at a time. After any error it is closed and of no more use."""

    def __init__(self, stream: Stream, server: ServerInfo, config: ClientConfig) -> None:
        self._stream = stream
        self._peer = server.peer
        self._config = config
        self._encoding: Encoding = config.wire if config.wire in server.encodings else "raw"

    @classmethod
    async def open(cls, transport: Transport, server: ServerInfo, config: ClientConfig) -> Self:
        """Connect. Raises `ServerLost`."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                stream = await transport.open(server.peer, server.addresses)
        except (StreamBroken, TimeoutError) as error:
            raise ServerLost(f"{server.peer} cannot be reached: {error}", peer=server.peer) from None
        return cls(stream, server, config)

    async def begin(self, message: Open, digests: torch.Tensor | None, inputs_BTD: torch.Tensor) -> torch.Tensor | None:
        """Open a session; returns the outputs of the first of its inputs, if the server has computed the same before.

        Raises `PeerError`s.
        """
        message = message.model_copy(update={"encoding": self._encoding})
        reply, answered = await self.ask(message, {} if digests is None else {"digests": digests}, expect=Opened)
        assert isinstance(reply, Opened)
        if not reply.num_tokens:
            return None
        outputs = answered.get("hidden")
        offered = 0 if digests is None else digests.shape[1] * PAGE_TOKENS
        batch_size, _, hidden_size = inputs_BTD.shape
        if (
            reply.num_tokens > offered
            or outputs is None
            or outputs.shape != (batch_size, reply.num_tokens, hidden_size)
            or not outputs.is_floating_point()
            or not _finite(outputs)
            or reply.encoding_of("hidden") not in ("raw", self._encoding)
        ):
            await self.close()
            raise ServerLost(f"{self._peer} knows something else than was asked", peer=self._peer)
        return as_received(outputs.to(inputs_BTD.dtype), self._config.wire)

    async def compute(
        self, message: Message, tensors: codec.Tensors, *, answer: TensorName, shape: torch.Size
    ) -> torch.Tensor:
        """Ask for a tensor of a known shape, as precise as the user wants tensors to travel.

        Raises `PeerError`s, and `UserError` for tensors that are too large for a message.
        """
        if sum(tensor.nbytes + TENSOR_ALIGNMENT for tensor in tensors.values()) > MAX_PAYLOAD_BYTES:
            raise UserError(
                f"{shape[1]} tokens of one sequence do not fit into a message of {MAX_PAYLOAD_BYTES >> 20} MiB",
                hint="use shorter sequences, or a dtype of fewer bytes",
            )
        reply, answered = await self.ask(message, tensors, expect=Result)
        result, encoding = answered.get(answer), reply.encoding_of(answer)
        if result is None or result.shape != shape or result.dtype != tensors["hidden"].dtype:
            wrong = "something else than was asked"
        elif encoding not in ("raw", self._encoding):
            wrong = f"in {encoding}, which nobody asked for"
        elif answer == "hidden" and not _plausible(result, tensors):  # gradients may overflow: scalers look at that
            wrong = "with numbers that are not finite"
        else:
            # The same from a server that does not know the encoding: which one it was must not make a difference.
            return result if encoding == self._config.wire else as_received(result, self._config.wire)
        await self.close()
        raise ServerLost(f"{self._peer} answered {wrong}", peer=self._peer)

    async def logits(self, request: Step, tensors: codec.Tensors, question: Question) -> Logits | None:
        """Ask for as many logits as `request` says; none of it, if these are 0. Raises `PeerError`s."""
        reply, answered = await self.ask(
            request, tensors, expect=Result, answer_bytes=question.num_bytes(tensors["hidden"], request.logits or 0)
        )
        if not request.logits:
            return None
        values, ids = answered.get("logits"), answered.get("ids")
        expected = (*tensors["hidden"].shape[:1], request.logits, question.width)
        if (
            values is None
            or values.shape != expected
            or values.dtype != tensors["hidden"].dtype
            or reply.encoding_of("logits") != "raw"
            or (ids is None) != (request.top_k is None)
            or (ids is not None and (ids.shape != expected or not question.are_tokens(ids)))
        ):
            wrong = "something else than was asked"
        elif not _plausible(values, tensors):
            wrong = "with numbers that are not finite"
        else:
            return Logits(values, ids)
        await self.close()
        raise ServerLost(f"{self._peer} answered {wrong}", peer=self._peer)

    async def ask(
        self,
        message: Message,
        tensors: codec.Tensors | None = None,
        *,
        expect: type[Message],
        answer_bytes: int | None = None,
    ) -> tuple[Message, codec.Tensors]:
        """Send a message and wait for its answer, as long as the server says that it is working on it, up to a limit.

        The answer is about as long as the question, if `answer_bytes` does not say how long.

        Raises `PeerError`s.
        """
        config = self._config
        try:
            # Both directions: a server that is still receiving the question has nothing to say either.
            question_bytes = sum(tensor.nbytes for tensor in (tensors or {}).values())
            in_flight = question_bytes + (question_bytes if answer_bytes is None else answer_bytes)
            silence_seconds = config.silence_seconds + in_flight / SLOWEST_LINK
            async with asyncio.timeout(config.longest_answer_seconds) as limit:
                async with asyncio.timeout(silence_seconds):
                    await codec.send(self._stream, message, tensors, self._encoding)
                while True:
                    async with asyncio.timeout(silence_seconds):
                        reply, answered = await codec.receive(self._stream)
                    if isinstance(reply, expect):
                        return reply, answered
                    if not isinstance(reply, Working):
                        raise self._error(message, reply)
        except BaseException as error:
            await self.close(goodbye=False)
            what: object = error
            if isinstance(error, TimeoutError):
                what = (
                    f"no answer within {config.longest_answer_seconds:g} s"
                    if limit.expired()
                    else f"said nothing for {silence_seconds:.1f} s"
                )
            if isinstance(error, StreamBroken | TimeoutError | ProtocolViolation):
                raise ServerLost(f"{self._peer} is lost: {what}", peer=self._peer) from None
            raise

    def _error(self, question: Message, reply: Message) -> PeerError:
        peer = self._peer
        if not isinstance(reply, Failure):
            return ServerLost(f"{peer} answered with {reply.kind!r}, which nobody asked for", peer=peer)
        match reply.code:
            case "busy":
                seconds = max(reply.retry_after or 0.0, SOON)
                return ServerBusy(f"{peer} is busy: {reply.reason}", peer=peer, retry_after=seconds)
            case "misrouted":
                return Misrouted(f"{peer} cannot do this: {reply.reason}", peer=peer)
            case "rejected":
                return RequestRejected(f"{peer} rejects this: {reply.reason}", peer=peer)
            case "rewind" if isinstance(question, Step) and question.position > 0:
                return CannotRewind(reply.reason, peer=peer)
            case _:
                return ServerLost(f"{peer} gave up: {reply.reason}", peer=peer)

    async def close(self, *, goodbye: bool = True) -> None:
        """Release the stream, telling the server if it may still be listening. May be called twice."""
        if goodbye:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(1):
                    await codec.send(self._stream, Close())
        await self._stream.close()


def _plausible(result_BTD: torch.Tensor, tensors: codec.Tensors) -> bool:
    """Whether finite inputs gave finite outputs, for the last of them at least. Padding may become anything."""
    if _finite(result_BTD) or not _finite(tensors["hidden"]):
        return True
    mask_BT = tensors.get("mask")
    return mask_BT is not None and bool(torch.isfinite(result_BTD[mask_BT[:, -result_BTD.shape[1] :].bool()]).all())


def _finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity: the fastest way to know, a few microseconds for a token."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
