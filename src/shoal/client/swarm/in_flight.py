"""What is in flight to one server, over all streams to it.

The streams share one network connection. So a ping waits behind what another stream carries, and anything that comes on
one of the streams shows that the server is alive.
"""

from __future__ import annotations

from shoal.net.transport import CHUNK_BYTES, SLOWEST_LINK, Stream


class PeerInFlight:
    """The open streams to one server, and how many bytes of each may be in flight."""

    def __init__(self) -> None:
        self._bytes: dict[Stream, int] = {}

    def set_bytes(self, stream: Stream, num_bytes: int) -> None:
        """Up to `num_bytes` of a stream are in flight now."""
        self._bytes[stream] = num_bytes

    def discard(self, stream: Stream) -> None:
        """The stream is of no more use."""
        self._bytes.pop(stream, None)

    @property
    def bytes_in_flight(self) -> int:
        """The bytes in flight on all streams."""
        return sum(self._bytes.values())

    def seconds_for(self, num_bytes: int) -> float:
        """Seconds until a part of a message of `num_bytes` must have been taken, if all streams take turns."""
        return len(self._bytes) * min(num_bytes, CHUNK_BYTES) / SLOWEST_LINK

    @property
    def heard_at(self) -> float:
        """When anything came last on any of the streams, by the event loop's clock."""
        return max((stream.heard_at for stream in self._bytes), default=float("-inf"))
