"""What the streams to one server have in common: they travel over one connection, one behind the other.

So a ping waits for what another stream carries, and whatever comes on any of them says that the server is there.
"""

from __future__ import annotations

from shoal.net.transport import CHUNK_BYTES, SLOWEST_LINK, Stream


class PeerInFlight:
    """The streams to one server that are of use, and what is on its way to it."""

    def __init__(self) -> None:
        self._carried: dict[Stream, int] = {}

    def set_bytes(self, stream: Stream, num_bytes: int) -> None:
        """So many bytes of a stream may be on their way now."""
        self._carried[stream] = num_bytes

    def discard(self, stream: Stream) -> None:
        """It is of no more use."""
        self._carried.pop(stream, None)

    @property
    def bytes_in_flight(self) -> int:
        """Of all streams."""
        return sum(self._carried.values())

    def seconds_for(self, num_bytes: int) -> float:
        """How long it may take until a part of what is sent on one of them is taken, if all take turns."""
        return len(self._carried) * min(num_bytes, CHUNK_BYTES) / SLOWEST_LINK

    @property
    def heard_at(self) -> float:
        """When anything came last, on any of them."""
        return max((stream.heard_at for stream in self._carried), default=float("-inf"))
