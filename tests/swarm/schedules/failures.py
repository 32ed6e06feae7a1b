"""The ways in which a server can fail, and the moments."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shoal.net.memory import Frame
from shoal.spans import Span

from .bed import Bed, Member

SLOWNESS = 100.0
LATE_SECONDS = 1.5


@dataclass(frozen=True)
class Failure:
    """One server fails in one way, at a moment that is counted in frames.

    The moment is `late` seconds after the `after`-th frame since the last failure, of those that are sent while a
    client is in `phase` (in any, if that is empty). With 0 it is when that begins: at once, or when a client enters
    the phase. The `victim` is the sender or the receiver of that frame, or the server of that name; then only frames
    of that server are counted. The failure lasts for `lasts` seconds, or for ever if that is None. A server that
    restarts does so after `lasts` seconds, with `blocks` if they are given.
    """

    kind: str
    victim: str = "receiver"
    after: int = 0
    late: float = 0.0
    lasts: float | None = None
    phase: str = ""
    blocks: str = ""

    def __str__(self) -> str:
        when = f"{self.late:g} s after " if self.late else "at "
        when += f"{self.victim}'s frame {self.after}" if self.is_named else f"frame {self.after}"
        if self.phase:
            when += f" of {self.phase}"
        who = self.victim if self.is_named else f"its {self.victim}"
        blocks = f" with {self.blocks}" if self.blocks else ""
        how_long = "" if self.lasts is None else f", for {self.lasts:g} s"
        return f"{when}: {who} {self.kind}{blocks}{how_long}"

    @property
    def is_named(self) -> bool:
        return self.victim not in ("sender", "receiver")


@dataclass(frozen=True)
class Blow:
    """A failure as it happens: the server that it hits, and the peer at the other end of the frame."""

    bed: Bed
    victim: Member
    other: str
    failure: Failure

    def lasting(self) -> None:
        """The server is unsound from now on, until the failure is over."""
        self.victim.sound = False
        if self.failure.lasts is not None:
            asyncio.get_running_loop().call_later(self.failure.lasts, self._recover)

    def _recover(self) -> None:
        if self.victim.alive and not self.victim.leaving.is_set():
            self.bed.tell(f"{self.victim} is well again")
            self.bed.network.heal(self.victim.name)
            self.victim.executor.recover()
            self.victim.sound = True


def dies(blow: Blow) -> None:
    blow.bed.kill(blow.victim)


def restarts(blow: Blow) -> None:
    """With an empty cache, and perhaps with other blocks."""
    bed, victim = blow.bed, blow.victim
    bed.kill(victim)
    span = Span.parse(blow.failure.blocks) if blow.failure.blocks else victim.span
    if not blow.failure.lasts:
        bed.start(span, victim.name)
    else:
        asyncio.get_running_loop().call_later(blow.failure.lasts, bed.start, span, victim.name)


def leaves(blow: Blow) -> None:
    blow.bed.dismiss(blow.victim)


def is_cut_off(blow: Blow) -> None:
    blow.bed.network.cut(blow.victim.name)
    blow.lasting()


def loses_one(blow: Blow) -> None:
    """The link to the peer at the other end breaks."""
    blow.bed.network.cut(blow.victim.name, blow.other)
    blow.lasting()


def hangs(blow: Blow) -> None:
    """A black hole."""
    blow.bed.network.hang(blow.victim.name)
    blow.lasting()


def hangs_for_one(blow: Blow) -> None:
    blow.bed.network.hang(blow.victim.name, blow.other)
    blow.lasting()


def freezes(blow: Blow) -> None:
    """The process is stopped: it neither receives nor computes."""
    blow.bed.network.hang(blow.victim.name)
    blow.victim.executor.thawed.clear()
    blow.lasting()


def is_not_heard(blow: Blow) -> None:
    """One direction is silent."""
    blow.bed.network.mute(blow.victim.name, blow.other)
    blow.lasting()


def hears_nothing(blow: Blow) -> None:
    """The other one."""
    blow.bed.network.mute(blow.other, blow.victim.name)
    blow.lasting()


def computes_slowly(blow: Blow) -> None:
    blow.victim.executor.slowness = SLOWNESS
    blow.lasting()


def is_far_away(blow: Blow) -> None:
    blow.bed.network.delay(LATE_SECONDS, blow.victim.name)
    blow.lasting()


def loses_its_stream(blow: Blow) -> None:
    """The stream ends behind the next frame."""
    blow.bed.network.drop_after(blow.victim.name, 1)


def breaks_its_streams(blow: Blow) -> None:
    """All of them end, and with them the frames that are on their way."""
    blow.bed.network.disconnect(blow.victim.name)


HAPPENINGS: Mapping[str, Callable[[Blow], None]] = {
    does.__name__.replace("_", " "): does
    for does in (
        dies,
        restarts,
        leaves,
        loses_its_stream,
        breaks_its_streams,
        hangs,
        is_cut_off,
        freezes,
        is_not_heard,
        hears_nothing,
        loses_one,
        hangs_for_one,
        computes_slowly,
        is_far_away,
    )
}
ONE_TIME = frozenset({"loses its stream", "breaks its streams"})
"""Failures after which the server is as it was."""


# -- nonsense: what becomes of the next answer -------------------------------------------------------------------------


def _of_another_shape(frame: Frame) -> Frame:
    header = json.loads(frame.header)
    for tensor in header.get("tensors", ()):
        if len(tensor["shape"]) > 1 and math.prod(tensor["shape"]):
            tensor["shape"] = [math.prod(tensor["shape"][:2]), 1, *tensor["shape"][2:]]
    return replace(frame, header=json.dumps(header).encode())


def _of_no_number(frame: Frame) -> Frame:
    """Gradients are spared: they may overflow in earnest, and the trainer has to notice that itself."""
    tensors = json.loads(frame.header).get("tensors", ())
    if not any(tensor["name"] == "hidden" for tensor in tensors) or any(tensor["name"] == "grad" for tensor in tensors):
        return frame
    nothing = torch.full((len(frame.payload) // 4,), math.nan)
    return replace(frame, payload=nothing.numpy().tobytes())


def _too_short(frame: Frame) -> Frame:
    return replace(frame, payload=frame.payload[: len(frame.payload) // 2])


def _of_another_kind(frame: Frame) -> Frame:
    return replace(frame, header=b'{"kind": "pong", "tensors": []}', payload=b"")


def _of_no_kind(frame: Frame) -> Frame:
    return replace(frame, header=b"\x00\xff nonsense")


NONSENSE: Mapping[str, Callable[[Frame], Frame]] = {
    "sends a tensor of another shape": _of_another_shape,
    "sends numbers that are none": _of_no_number,
    "sends less than it says": _too_short,
    "sends something else": _of_another_kind,
    "sends noise": _of_no_kind,
}
KINDS = (*HAPPENINGS, *NONSENSE)


# -- when --------------------------------------------------------------------------------------------------------------


class Director:
    """Watches the frames of a swarm, and lets one failure after another happen when its moment has come."""

    def __init__(self, bed: Bed, failures: Sequence[Failure]) -> None:
        self._bed = bed
        self._next = list(failures)
        self._num_seen = 0
        self._frame: Frame | None = None
        self._nonsense: dict[str, str] = {}
        bed.network.on_frame = self._on_frame
        bed.on_phase = lambda phase: self._look()

    def _on_frame(self, frame: Frame) -> Frame:
        self._frame = frame
        if self._next and self._counts(frame, self._next[0]):
            self._num_seen += 1
        self._look()
        if json.loads(frame.header).get("tensors") and (nonsense := self._nonsense.pop(frame.sender, None)):
            return NONSENSE[nonsense](frame)
        return frame

    def _counts(self, frame: Frame, failure: Failure) -> bool:
        return self._is_phase(failure) and (not failure.is_named or failure.victim in (frame.sender, frame.receiver))

    def _is_phase(self, failure: Failure) -> bool:
        return not failure.phase or failure.phase in self._bed.phases.values()

    def _look(self) -> None:
        while self._next and self._num_seen >= self._next[0].after and self._is_phase(self._next[0]):
            failure, self._num_seen = self._next.pop(0), 0
            blow = self._blow(failure, self._frame)
            if blow is None:
                continue
            if failure.late:
                asyncio.get_running_loop().call_later(failure.late, self._strike, blow)
            else:
                self._strike(blow)

    def _blow(self, failure: Failure, frame: Frame | None) -> Blow | None:
        """The failure with its victim; None if there is no server that it could hit."""
        bed, living = self._bed, {member.name: member for member in self._bed.living}
        ends = [] if frame is None else [frame.receiver, frame.sender]
        if failure.victim == "sender":
            ends.reverse()
        name = failure.victim if failure.is_named else next((end for end in ends if end in living), "")
        if name not in living and living:
            name = sorted(living)[sum(name.encode()) % len(living)]
        if name not in living:
            return None
        others = [end for end in ends if end != name] if name in ends else [*bed.phases]
        return Blow(bed, living[name], others[0] if others else name, failure)

    def _strike(self, blow: Blow) -> None:
        bed, victim, kind = blow.bed, blow.victim, blow.failure.kind
        if not victim.alive or victim.leaving.is_set():
            return
        what = f"{victim} {kind}"
        if kind in ("loses one", "hangs for one", "is not heard", "hears nothing"):
            what += f" ({blow.other})"
        bed.tell(f"{what}{self._during(bed)}")
        if kind in NONSENSE:
            self._nonsense[victim.name] = kind
            return
        if kind not in ONE_TIME:
            bed.keep_blocks_served(victim)
        HAPPENINGS[kind](blow)

    def _during(self, bed: Bed) -> str:
        phases = ", ".join(f"{client}: {phase}" for client, phase in bed.phases.items())
        if self._frame is None:
            return f" during {phases}"
        kind = json.loads(self._frame.header).get("kind")
        return f", last frame {kind!r} {self._frame.sender} -> {self._frame.receiver}, during {phases}"
