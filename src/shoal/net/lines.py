"""What is known of the lines to other peers: how much they carry in each direction, and what packing for them costs.

`shoal.policy.network.goodput` decides. What is known is common to all streams to a peer; who wants packing is not.
"""

from __future__ import annotations

from collections import OrderedDict

from shoal.policy.network.goodput import FIRST_GUESSES, LARGE_BYTES, Arriving, Begun, Coder, Told, packs
from shoal.tensors import DType

MAX_LINES = 4096
"""The peers whose lines are remembered: the latest."""


class Coders:
    """What packing does on this machine, for each dtype."""

    def __init__(self) -> None:
        self._known: dict[DType, Coder] = dict(FIRST_GUESSES)

    def of(self, dtype: DType) -> Coder | None:
        """What packing does to tensors of this dtype; `None` if they are never packed."""
        return self._known.get(dtype)

    def packed(self, dtype: DType, num_bytes: int, num_packed: int, seconds: float) -> None:
        """A tensor of `num_bytes` took `seconds` to pack into `num_packed` bytes."""
        self._known[dtype] = self._known[dtype].after(num_bytes, num_packed, seconds)

    def sent_raw(self, dtype: DType, num_bytes: int) -> None:
        """A tensor of `num_bytes` was not packed, although the line is measured."""
        self._known[dtype] = self._known[dtype].after_sending_raw(FIRST_GUESSES[dtype], num_bytes)


class SharedLine:
    """What is known of the line to one peer, over all streams."""

    def __init__(self, coders: Coders | None = None) -> None:
        self._coders = coders or Coders()
        self._told = Told()
        self._arriving = Arriving()
        self._has_news = False

    # -- to the peer --------------------------------------------------------------------------------------------------

    def told(self, goodput: int) -> None:
        """The peer says how many bytes per second arrive there; 0 if it does not know, which changes nothing."""
        if goodput:
            self._told = Told(goodput)

    def packs(self, dtype: DType, num_bytes: int) -> bool:
        """Whether a tensor of this size is sent packed."""
        coder = self._coders.of(dtype)
        if coder is None or self._told.goodput is None:
            return False
        if not packs(num_bytes, coder, goodput=self._told.goodput):
            self._coders.sent_raw(dtype, num_bytes)
            return False
        return True

    def packed(self, dtype: DType, num_bytes: int, num_packed: int, seconds: float) -> None:
        """A tensor of `num_bytes` took `seconds` to pack into `num_packed` bytes, which are sent."""
        self._coders.packed(dtype, num_bytes, num_packed, seconds)
        self._told = self._told.after_sending(num_packed)

    # -- from the peer ------------------------------------------------------------------------------------------------

    def begin(self, num_bytes: int, *, now: float) -> Begun | None:
        """A frame begins to arrive; `None` if it is too small to tell anything."""
        if num_bytes < LARGE_BYTES:
            return None
        self._arriving = self._arriving.begun(now=now)
        return Begun(now, self._arriving.frame_seconds)

    def end(self, frame: Begun, num_bytes: int, *, now: float) -> None:
        """A frame is complete; it has 0 bytes if it was given up."""
        self._arriving = self._arriving.ended(frame, num_bytes, now=now)
        self._has_news |= num_bytes > 0

    @property
    def goodput(self) -> int:
        """The bytes per second that arrive; 0 if that is not known."""
        return round(self._arriving.goodput or 0)

    @property
    def has_news(self) -> bool:
        """Whether something has arrived of which the peer was not told."""
        return self._has_news

    def tell(self) -> int:
        """The goodput, which the peer is told now."""
        self._has_news = False
        return self.goodput


class Line:
    """The line to one peer as one stream uses it.

    `is_told` says whether the peer has told its goodput over this stream, and so that it wants packing; `has_told`
    whether this side has. If a large frame arrives over the stream, it has to be here by `arriving_until`, over the
    slowest link; else that is None.
    """

    def __init__(self, shared: SharedLine | None = None) -> None:
        self.shared = shared or SharedLine()
        self.is_told = self.has_told = False
        self.arriving_until: float | None = None

    def told(self, goodput: int) -> None:
        """The peer says how many bytes per second arrive there; 0 if it does not know."""
        self.is_told = True
        self.shared.told(goodput)

    def tell(self) -> int:
        """The goodput, which the peer is told now."""
        self.has_told = True
        return self.shared.tell()


class Lines:
    """The lines of one peer to others."""

    def __init__(self) -> None:
        self._coders = Coders()
        self._lines: OrderedDict[str, SharedLine] = OrderedDict()

    def of_stream(self, peer: str) -> Line:
        """The line to a peer, for one more stream."""
        return Line(self.to(peer))

    def to(self, peer: str) -> SharedLine:
        """The line to a peer."""
        line = self._lines.setdefault(peer, SharedLine(self._coders))
        self._lines.move_to_end(peer)
        if len(self._lines) > MAX_LINES:
            self._lines.popitem(last=False)
        return line
