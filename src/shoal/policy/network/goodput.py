"""Whether a tensor is packed without loss: what the line to a peer carries, what the coder costs, and what it saves.

The receiver measures: only it knows when bytes arrive, because buffers on the way take several MB at once. It tells
the sender the *goodput* of its large frames, packed or not, with what it sends back. The sender compares

    raw      bytes / goodput
    packed   bytes × ratio / goodput + bytes × (seconds of packing and unpacking) + a constant

with a ratio and a speed that it has measured, and packs where that is clearly faster. A line that is not measured is
raw, and so is a fast one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shoal.tensors import DType

BURST_BYTES = 64 * 1024
"""So much of a frame may be there when its header is read: how long that took is not known."""
LARGE_BYTES = 2 * BURST_BYTES
"""Smaller frames tell nothing of a line."""
NUM_SEEN = 8
"""The goodput of a line is the upper quartile of this many frames. A busy machine makes many of them look slow, and few
fast: those that have arrived before their header is read."""
MIN_SEEN = 2
"""With fewer frames than this, it is not known."""
STALE_BYTES = 16 << 20
"""A goodput is forgotten when so much was sent packed, and the receiver has said nothing: packed, its frames may be too
small to measure. The next ones are raw."""
OVERHEAD_SECONDS = 200e-6
"""What packing and unpacking take however small a tensor is."""
GAIN = 0.95
"""Packing has to take less than this part of the time that raw bytes take."""
SURPRISE = 2.0
"""A tensor counts as if it took at most this many times as long as usual: its thread may have waited for a core."""
UNPACKING = 2.0
"""Packing and unpacking take this many times as long as packing."""
MIN_BYTES = 1024
"""Smaller tensors are not packed: the table of a code takes as much as it saves."""
WEIGHT = 0.25
"""Of the latest tensor in the averages, if it is large. A small one has a smaller part, by its size."""
RETURN = 0.05
"""A large tensor that is raw moves the averages by this part back to the first guess: then packing is tried again."""


@dataclass(frozen=True)
class Coder:
    """What packing does to tensors of one dtype: the part of their bytes that is left, and seconds per byte."""

    ratio: float
    seconds_per_byte: float = 1.5e-9

    def after(self, num_bytes: int, num_packed: int, seconds: float) -> Coder:
        """With a tensor of `num_bytes` that took `seconds` to pack into `num_packed` bytes."""
        seconds_per_byte = min(seconds / num_bytes, SURPRISE * self.seconds_per_byte)
        return self._towards(Coder(num_packed / num_bytes, seconds_per_byte), WEIGHT, num_bytes)

    def after_sending_raw(self, first: Coder, num_bytes: int) -> Coder:
        """With a tensor of `num_bytes` that was not packed; `first` is what was assumed before any was."""
        return self._towards(first, RETURN, num_bytes)

    def _towards(self, other: Coder, weight: float, num_bytes: int) -> Coder:
        weight *= min(1.0, num_bytes / LARGE_BYTES)
        return Coder(
            self.ratio + weight * (other.ratio - self.ratio),
            self.seconds_per_byte + weight * (other.seconds_per_byte - self.seconds_per_byte),
        )


FIRST_GUESSES: Mapping[DType, Coder] = {"bfloat16": Coder(0.7), "float16": Coder(0.87), "float32": Coder(0.85)}
"""The dtypes that may be packed, and what is assumed before that was measured (hidden states of trained models)."""


def packs(num_bytes: int, coder: Coder, *, goodput: float | None) -> bool:
    """Whether a tensor of `num_bytes` is there sooner if it is packed. `goodput` is in bytes per second."""
    if goodput is None or num_bytes < MIN_BYTES:
        return False
    raw = num_bytes / goodput
    packed = coder.ratio * raw + UNPACKING * coder.seconds_per_byte * num_bytes + OVERHEAD_SECONDS
    return packed < GAIN * raw


@dataclass(frozen=True)
class Told:
    """The bytes per second that a receiver told its sender, if any. `unanswered` bytes were sent packed since."""

    goodput: float | None = None
    unanswered: int = 0

    def after_sending(self, num_bytes: int) -> Told:
        """With `num_bytes` that were sent packed."""
        unanswered = self.unanswered + num_bytes
        return Told() if unanswered > STALE_BYTES else replace(self, unanswered=unanswered)


@dataclass(frozen=True)
class Begun:
    """A large frame that is arriving: since when, and the sum that `Arriving` had then."""

    at: float
    frame_seconds: float


@dataclass(frozen=True)
class Arriving:
    """The large frames that come from one peer. They share the line: `num_open` of them come now.

    `frame_seconds` is the integral of their number over time, until `changed_at`. `seen` has the goodput of the latest.
    """

    num_open: int = 0
    frame_seconds: float = 0.0
    changed_at: float = 0.0
    seen: tuple[float, ...] = ()

    def begun(self, *, now: float) -> Arriving:
        """One more frame arrives."""
        return replace(self._until(now), num_open=self.num_open + 1)

    def ended(self, frame: Begun, num_bytes: int, *, now: float) -> Arriving:
        """A frame of `num_bytes` bytes is complete; 0 if it was given up.

        While it came, it had the share of the line that as many frames leave to each as came on average.
        """
        after = replace(self._until(now), num_open=self.num_open - 1)
        seconds = now - frame.at
        if num_bytes < LARGE_BYTES or seconds <= 0:
            return after
        num_sharing = (after.frame_seconds - frame.frame_seconds) / seconds
        goodput = num_sharing * (num_bytes - BURST_BYTES) / seconds
        return replace(after, seen=(*self.seen, goodput)[-NUM_SEEN:])

    @property
    def goodput(self) -> float | None:
        """Bytes per second of the line; `None` if too few large frames have come."""
        return sorted(self.seen)[len(self.seen) * 3 // 4] if len(self.seen) >= MIN_SEEN else None

    def _until(self, now: float) -> Arriving:
        frame_seconds = self.frame_seconds + self.num_open * (now - self.changed_at)
        return replace(self, frame_seconds=frame_seconds, changed_at=now)
