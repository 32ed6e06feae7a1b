"""Limits the memory for frames that are being received, of each peer and of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shoal.net.transport import SLOWEST_LINK, StreamBroken
from shoal.policy.network.frame_room import (
    MAX_BYTES,
    MAX_PEER_BYTES,
    MAX_WAITING_OF_NETWORK,
    Frame,
    gives_way,
    next_frame,
)

LOOK_SECONDS = 0.5
"""How often a frame that waits looks whether another one has to give way."""
UNCOUNTED_BYTES = 4096
"""A payload that is not larger than this is not counted: a header may be larger."""


@dataclass(eq=False)
class Reservation:
    """The room of one frame, which is received or waits. `num_received` tells how many of its bytes have come."""

    frame: Frame
    num_received: Callable[[], int]
    give_way: Callable[[], None]
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def now(self) -> Frame:
        """The frame as far as it has come."""
        return replace(self.frame, num_received=self.num_received())


class ReceiveBudget:
    """Room for frames, which `policy.network.frame_room` shares."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_peer_bytes: int = MAX_PEER_BYTES) -> None:
        self._max_bytes = max_bytes
        self._max_peer_bytes = max_peer_bytes
        self._held: list[Reservation] = []
        self._waiting: list[Reservation] = []

    async def acquire(
        self, frame: Frame, *, num_received: Callable[[], int], give_way: Callable[[], None]
    ) -> Reservation | None:
        """Wait until the frame has room. `release` that when the frame is complete or lost; None needs no release.

        `give_way` is called when the frame has to end, and its room has been released already. Raises `StreamBroken`
        if too many frames of the network wait.
        """
        if frame.num_bytes <= UNCOUNTED_BYTES:
            return None
        reservation = Reservation(frame, num_received, give_way)
        if sum(each.frame.network == frame.network for each in self._waiting) >= MAX_WAITING_OF_NETWORK:
            raise StreamBroken(f"{frame.peer} sends too much at a time")
        self._waiting.append(reservation)
        self._admit()
        try:
            while not reservation.admitted.done():
                await asyncio.wait([reservation.admitted], timeout=LOOK_SECONDS)
                if not reservation.admitted.done():
                    self._make_room()
        except asyncio.CancelledError:
            self.release(reservation)
            raise
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Return the room of a frame, or its place among those that wait, and admit those that fit now."""
        for frames in self._held, self._waiting:
            if reservation in frames:
                frames.remove(reservation)
        self._admit()

    def _admit(self) -> None:
        held, waiting = [each.frame for each in self._held], [each.frame for each in self._waiting]
        while waiting:
            index = next_frame(held, waiting, max_bytes=self._max_bytes, max_peer_bytes=self._max_peer_bytes)
            if index is None:
                return
            held.append(waiting.pop(index))
            admitted = self._waiting.pop(index)
            now = asyncio.get_running_loop().time()
            admitted.frame = replace(admitted.frame, since=now)
            self._held.append(admitted)
            admitted.admitted.set_result(None)

    def _make_room(self) -> None:
        index = gives_way(
            [each.now for each in self._held],
            [each.frame for each in self._waiting],
            max_peer_bytes=self._max_peer_bytes,
            slowest_link=SLOWEST_LINK,
            now=asyncio.get_running_loop().time(),
        )
        if index is not None:
            ended = self._held[index]
            self.release(ended)
            ended.give_way()
