"""Gives machines that join what they need: an invitation, the manifest of the weights, and pieces of the files.

Every piece is checked before it is sent. Uploads have a limit, and few are under way at a time: tokens come first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import torch

from shoal.errors import ShoalError
from shoal.joining.invitation import Invitation
from shoal.model.weights.piece_store import PieceSource
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.policy.pacing import Pacer
from shoal.protocol import Content, GetHeld, GetInvitation, GetManifest, GetPiece, InvitationText
from shoal.server.refusals import busy, misrouted

MAX_UPLOADS = 4
"""Pieces on their way at a time, to all peers together."""
MAX_UPLOADS_PER_PEER = 2
SEND_SECONDS = 60.0
"""How long a peer may take for one piece: slower ones would keep others waiting."""

Request = GetInvitation | GetManifest | GetHeld | GetPiece


class WeightsService:
    """Answers those who join. Until `offer` is called, it has nothing to give.

    `upload_limit` is in bytes per second, for all peers together; `None` is no limit, 0 gives no pieces.
    """

    def __init__(self, *, upload_limit: float | None = None) -> None:
        self._pacer = Pacer(upload_limit) if upload_limit else None
        self._refuses = upload_limit == 0
        self._invitation: Invitation | None = None
        self._source: PieceSource | None = None
        self._uploads = Counter[str]()

    def offer(self, invitation: Invitation, source: PieceSource | None) -> None:
        """From now on, invite with this, and give pieces from the source. Without one, there are none to give."""
        self._invitation, self._source = invitation, source

    async def answer(self, stream: Stream, request: Request) -> None:
        """Answer one request. Raises `Refused`, `StreamBroken`, and `TimeoutError` for a peer that reads too slowly."""
        match request:
            case GetInvitation():
                invitation = self._invitation
                if invitation is None or request.digest not in (None, invitation.digest):
                    raise misrouted("this server does not know that invitation")
                await codec.send(stream, InvitationText(text=invitation.text))
            case GetManifest():
                await _send(stream, self._source_of(request.manifest).manifest.to_bytes)
            case GetHeld():
                source = self._source_of(request.manifest)
                await _send(stream, lambda: _bits(source))
            case GetPiece():
                await self._upload(stream, self._source_of(request.manifest), request.piece)

    def _source_of(self, manifest: str) -> PieceSource:
        if self._refuses:
            raise misrouted("this server gives no weights away")
        if self._source is None or self._source.manifest.name != manifest:
            raise misrouted("this server does not have these weights")
        return self._source

    async def _upload(self, stream: Stream, source: PieceSource, piece: int) -> None:
        if not source.holds(piece):
            raise misrouted("this server does not have that piece")
        if self._uploads.total() >= MAX_UPLOADS or self._uploads[stream.peer] >= MAX_UPLOADS_PER_PEER:
            raise busy("others are given weights")
        self._uploads[stream.peer] += 1
        try:
            if self._pacer is not None:
                loop = asyncio.get_running_loop()
                await asyncio.sleep(self._pacer.reserve(source.manifest.place(piece).length, now=loop.time()))
            try:
                await _send(stream, lambda: source.read(piece))
            except ShoalError as damage:
                raise misrouted(f"a file has changed here: {type(damage).__name__}") from None
        finally:
            self._uploads[stream.peer] -= 1
            self._uploads += Counter()  # drops those that are 0


async def _send(stream: Stream, read: Callable[[], bytes]) -> None:
    content = torch.frombuffer(bytearray(await asyncio.to_thread(read)), dtype=torch.uint8)
    async with asyncio.timeout(SEND_SECONDS):
        await codec.send(stream, Content(), {"content": content})


def _bits(source: PieceSource) -> bytes:
    held = bytearray(-(-source.manifest.num_pieces // 8))
    for piece in range(source.manifest.num_pieces):
        held[piece // 8] |= source.holds(piece) << piece % 8
    return bytes(held)
