"""Gives machines that join what they need: an invitation, the manifest of the weights, and pieces of the files.

Every piece is checked before it is sent. Uploads have a limit, few are under way at a time, and one thread of the
lowest priority reads them: tokens come first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from shoal.errors import ShoalError
from shoal.joining.invitation import Invitation
from shoal.model.weights.pieces.piece_store import PieceSource
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.policy.network.pacing import Pacer
from shoal.policy.network.uploads import SEND_SECONDS, Upload, gives_way
from shoal.protocol import Content, GetHeld, GetInvitation, GetManifest, GetPiece, InvitationText
from shoal.server.refusals import busy, misrouted

log = logging.getLogger(__name__)

MAX_UPLOADS = 4
"""Pieces on their way at a time, to all peers together; and lists of pieces."""
MAX_UPLOADS_PER_PEER = 2
MAX_DELAY_SECONDS = 5.0
"""The longest that a piece waits for the upload limit; later ones are told to come back."""
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
        self._uploads = _UnderWay()  # pieces
        self._listings = _UnderWay()  # what else is sent
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

    async def _send(self, stream: Stream, read: Callable[[], bytes], under_way: _UnderWay) -> None:
        with under_way.counted(stream.peer):
            try:
                content = await self.read(lambda: torch.frombuffer(bytearray(read()), dtype=torch.uint8))
            except ShoalError as damage:
                raise misrouted(f"a file has changed here: {type(damage).__name__}") from None
            if self._pacer is not None:
                loop = asyncio.get_running_loop()
                await asyncio.sleep(self._pacer.reserve(content.nbytes, now=loop.time()))
            async with under_way.sending(stream, content.nbytes):
                await codec.send(stream, Content(), {"content": content})


class _UnderWay:
    """The answers of a kind that are under way: few at a time, and few to each peer."""

    def __init__(self) -> None:
        self._num_of = Counter[str]()  # by peer
        self._sending: list[tuple[Stream, asyncio.Timeout, Callable[[], Upload]]] = []

    @contextlib.contextmanager
    def counted(self, peer: str) -> Iterator[None]:
        """An answer to a peer is under way. Raises `Refused` if there are too many, and none of them gives way."""
        is_full = self._num_of.total() >= MAX_UPLOADS
        if self._num_of[peer] >= MAX_UPLOADS_PER_PEER or (is_full and not self._make_room()):
            raise busy("others are given weights")
        self._num_of[peer] += 1
        try:
            yield
        finally:
            self._num_of[peer] -= 1
            if not self._num_of[peer]:
                del self._num_of[peer]

    @contextlib.asynccontextmanager
    async def sending(self, stream: Stream, num_bytes: int) -> AsyncIterator[None]:
        """These bytes are sent to a peer. Raises `TimeoutError` if it reads too slowly."""
        began, before = asyncio.get_running_loop().time(), stream.taken_bytes
        async with asyncio.timeout(SEND_SECONDS) as limit:
            entry = stream, limit, lambda: Upload(began, num_bytes, stream.taken_bytes - before)
            self._sending.append(entry)
            try:
                yield
            finally:
                if entry in self._sending:
                    self._sending.remove(entry)

    def _make_room(self) -> bool:
        """End the slowest answer, if it is too slow. Returns whether one is ended."""
        now = asyncio.get_running_loop().time()
        uploads = [upload() for _, _, upload in self._sending]
        chosen = gives_way(uploads, now=now)
        if chosen is None:
            return False
        stream, limit, _ = self._sending.pop(uploads.index(chosen))
        log.info("%s reads too slowly: its piece gives way to another peer's", stream.peer)
        limit.reschedule(now)
        return True


def _take_lowest_priority() -> None:
    if sys.platform == "linux":  # elsewhere, a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
