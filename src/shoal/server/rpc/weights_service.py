"""Gives machines that join what they need: an invitation, the manifest of the weights, and pieces of the files.

Every piece is checked before it is sent. Uploads have a limit, few are under way at a time, and one thread of the
lowest priority reads them: tokens come first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from shoal.errors import ShoalError
from shoal.joining.invitation import Invitation
from shoal.model.weights.pieces.piece_store import PieceSource
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.policy.network.pacing import Pacer
from shoal.protocol import Content, GetHeld, GetInvitation, GetManifest, GetPiece, InvitationText
from shoal.server.refusals import busy, misrouted

MAX_UPLOADS = 4
"""Pieces on their way at a time, to all peers together; and lists of pieces."""
MAX_UPLOADS_PER_PEER = 2
MAX_DELAY_SECONDS = 5.0
"""The longest that a piece waits for the upload limit; later ones are told to come back."""
SEND_SECONDS = 45.0
"""How long a peer may take for one answer: slower ones would keep others waiting."""
LOWEST_PRIORITY = 19

Request = GetInvitation | GetManifest | GetHeld | GetPiece
T = TypeVar("T")


class WeightsService:
    """Answers machines that join. Until `offer` is called, it has nothing to give. `close` it.

    `upload_limit` is in bytes per second, for all peers together; `None` is no limit, 0 gives no pieces.
    """

    def __init__(self, *, upload_limit: float | None = None) -> None:
        self._pacer = Pacer(upload_limit) if upload_limit else None
        self._refuses = upload_limit == 0
        self._invitation: Invitation | None = None
        self._source: PieceSource | None = None
        self._uploads = Counter[str]()  # pieces, by peer
        self._listings = Counter[str]()  # what else is sent
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shoal-pieces", initializer=_take_lowest_priority)

    def offer(self, invitation: Invitation, source: PieceSource | None) -> None:
        """From now on, invite with this, and give pieces from the source. Without one, there are none to give."""
        self._invitation, self._source = invitation, source

    async def read(self, work: Callable[[], T]) -> T:
        """The result of some work with the disk, on the thread that reads."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def close(self) -> None:
        """Have nothing to give any more, and end the thread after what it reads now."""
        self._invitation = self._source = None
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def answer(self, stream: Stream, request: Request) -> None:
        """Answer one request. Raises `Refused`, `StreamBroken`, and `TimeoutError` for a peer that reads too slowly."""
        if isinstance(request, GetInvitation):
            invitation = self._invitation
            if invitation is None or request.digest not in (None, invitation.digest):
                raise misrouted("this server does not know that invitation")
            async with asyncio.timeout(SEND_SECONDS):
                await codec.send(stream, InvitationText(text=invitation.text))
            return
        source = self._source_of(request.manifest)
        match request:
            case GetManifest():
                await self._send(stream, source.manifest.to_bytes, self._listings)
            case GetHeld():
                await self._send(stream, source.held, self._listings)
            case GetPiece() if not source.holds(request.piece):
                raise misrouted("this server does not have that piece")
            case GetPiece():
                self._check_pace()
                await self._send(stream, lambda: source.read(request.piece), self._uploads)

    def _source_of(self, manifest: str) -> PieceSource:
        if self._refuses:
            raise misrouted("this server gives no weights away")
        if self._source is None or self._source.manifest.name != manifest:
            raise misrouted("this server does not have these weights")
        return self._source

    def _check_pace(self) -> None:
        """Raises `Refused` if the limit makes a piece wait for so long that its receiver would give up."""
        if self._pacer is not None:
            delay = self._pacer.delay(now=asyncio.get_running_loop().time())
            if delay > MAX_DELAY_SECONDS:
                raise busy("others are given weights, up to this server's limit", retry_after=min(delay, 3600.0))

    async def _send(self, stream: Stream, read: Callable[[], bytes], under_way: Counter[str]) -> None:
        with _counted(stream.peer, under_way):
            try:
                content = await self.read(lambda: torch.frombuffer(bytearray(read()), dtype=torch.uint8))
            except ShoalError as damage:
                raise misrouted(f"a file has changed here: {type(damage).__name__}") from None
            if self._pacer is not None:
                loop = asyncio.get_running_loop()
                await asyncio.sleep(self._pacer.reserve(content.nbytes, now=loop.time()))
            async with asyncio.timeout(SEND_SECONDS):
                await codec.send(stream, Content(), {"content": content})


@contextlib.contextmanager
def _counted(peer: str, under_way: Counter[str]) -> Iterator[None]:
    """An answer to a peer is under way. Raises `Refused` if there are too many."""
    if under_way.total() >= MAX_UPLOADS or under_way[peer] >= MAX_UPLOADS_PER_PEER:
        raise busy("others are given weights")
    under_way[peer] += 1
    try:
        yield
    finally:
        under_way[peer] -= 1
        if not under_way[peer]:
            del under_way[peer]


def _take_lowest_priority() -> None:
    if sys.platform == "linux":  # elsewhere, a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
