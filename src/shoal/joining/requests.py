"""What a machine that joins asks of a member, and how it takes the answers: as those of a stranger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import torch

from shoal.concurrency import with_progress_timeout
from shoal.joining.invitation import Invitation
from shoal.model.weights.pieces.manifest import MAX_MANIFEST_BYTES, Manifest
from shoal.net.transport import SLOWEST_LINK, Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.protocol import (
    JOINING_KINDS,
    AnyMessage,
    Close,
    Content,
    Failure,
    GetHeld,
    GetInvitation,
    GetManifest,
    GetPiece,
    InvitationText,
    ProtocolViolation,
)

DIAL_SECONDS = 8.0
ANSWER_SECONDS = 10.0
"""How long a member may be silent; all of an answer may take the time for its bytes over the slowest link longer."""


class NoAnswer(Exception):
    """A member does not give what was asked for: it has not got it, refuses, breaks off, or is too slow.

    `retry_after` is set if it may give it later: after how many seconds.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Member:
    """A stream to a member, for one request after another. Each raises `NoAnswer`, after which the stream is of no use.

    What is returned is not checked against any digest, but for the manifest.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def peer(self) -> str:
        """Its peer id."""
        return self._stream.peer

    async def invitation(self, digest: str | None = None) -> Invitation:
        """The invitation with this digest, or any."""
        answer = await self._ask(GetInvitation(digest=digest), most=0)
        if not isinstance(answer[0], InvitationText):
            raise NoAnswer("another answer than an invitation")
        return Invitation.parse(answer[0].text)

    async def manifest(self, name: str) -> Manifest:
        """The manifest of this name. Raises `CheckpointError` if the member sent another one."""
        return Manifest.from_bytes(
            bytes(await self._content(GetManifest(manifest=name), MAX_MANIFEST_BYTES)), name=name
        )

    async def held(self, manifest: Manifest) -> bytes:
        """A bit for each piece: whether the member says that it has it."""
        size = -(-manifest.num_pieces // 8)
        held = await self._content(GetHeld(manifest=manifest.name), size)
        if len(held) != size:
            raise NoAnswer("a list of other pieces")
        return bytes(held)

    async def piece(self, manifest: Manifest, piece: int) -> memoryview:
        """The bytes that the member sends for a piece."""
        return await self._content(GetPiece(manifest=manifest.name, piece=piece), manifest.place(piece).length)

    async def _content(self, request: GetManifest | GetHeld | GetPiece, most: int) -> memoryview:
        message, tensors = await self._ask(request, most=most)
        content_N = tensors.get("content") if isinstance(message, Content) else None
        if content_N is None or content_N.dtype != torch.uint8 or content_N.dim() != 1:
            raise NoAnswer("an answer without the bytes that were asked for")
        content: memoryview = content_N.numpy().data
        return content[:most]

    async def _ask(self, request: AnyMessage, *, most: int) -> tuple[AnyMessage, codec.Tensors]:
        parsed: list[AnyMessage] = []

        def check_header(header: bytes, payload_bytes: int) -> None:
            parsed.append(codec.parse_header(header, payload_bytes, JOINING_KINDS))
            if payload_bytes > most + 16:  # tensors are aligned to 16 bytes
                raise ProtocolViolation(f"{payload_bytes} bytes where {most} are the most")

        try:
            async with asyncio.timeout(ANSWER_SECONDS + most / SLOWEST_LINK):
                await codec.send(self._stream, request)
                receiving = self._stream.receive(check_header)
                header, payload = await with_progress_timeout(
                    receiving, lambda: self._stream.heard_at, seconds=ANSWER_SECONDS
                )
            message, tensors = codec.decode(header, payload)
        except TimeoutError:
            raise NoAnswer("it takes too long") from None
        except (StreamBroken, ProtocolViolation) as error:
            raise NoAnswer(str(error) or type(error).__name__) from None
        if isinstance(message, Failure):
            raise NoAnswer(message.reason, retry_after=message.retry_after)
        return message, tensors


@contextlib.asynccontextmanager
async def member(transport: Transport, peer: str, addresses: Sequence[str] = ()) -> AsyncIterator[Member]:
    """Talk to a member. Raises `NoAnswer` if it cannot be reached."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            stream = await transport.open(peer, addresses)
    except (StreamBroken, TimeoutError) as error:
        raise NoAnswer(str(error) or "it does not answer") from None
    try:
        yield Member(stream)
        with contextlib.suppress(StreamBroken, TimeoutError):
            async with asyncio.timeout(1.0):
                await codec.send(stream, Close())
    finally:
        await stream.close()
