"""Which of a session's steps is computed next, whoever sends them and in whatever order they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.net.wire.codec import Tensors
from shoal.protocol import MAX_STEP_TOKENS, MAX_STEPS_AHEAD, Rewind, Step
from shoal.server.refusals import rejected

MAX_QUEUED_TOKENS = 8 * MAX_STEP_TOKENS
"""The tokens of all steps of one session that wait, over all sequences."""

Key = tuple[int, int]  # epoch, position


@dataclass(frozen=True)
class ReceivedStep:
    """A step and its inputs `hidden` [B, T, D], and how the batch is rearranged before it."""

    step: Step
    tensors: Tensors
    rows: tuple[int, ...] | None = None
    link: str | None = None
    """Over which it was pushed; None if the client sent it itself."""

    @property
    def key(self) -> Key:
        return self.step.epoch, self.step.position

    @property
    def num_tokens(self) -> int:
        return self.tensors["hidden"].shape[1]

    @property
    def size(self) -> int:
        """The tokens of all its sequences."""
        return self.tensors["hidden"].shape[0] * self.num_tokens


class StepQueue:
    """Steps come from the client and from the server before, twice or too early; each is begun once, in its turn.

    The next step is that of `epoch` and `position`. Only the client, by a `Rewind`, makes it another one than that
    which follows the last. What it sends itself counts more than what is pushed: who pushes may be anybody, and cannot
    keep it from being heard.
    """

    def __init__(self, epoch: int, position: int) -> None:
        self.epoch = epoch
        self.position = position
        self._rows: tuple[int, ...] | None = None
        self._waiting: dict[Key, ReceivedStep] = {}
        self._last: Key | None = None

    def rewind(self, message: Rewind) -> None:
        """Raises `Refused` for an epoch that is not later than all before."""
        if message.epoch <= self.epoch:
            raise rejected(f"epoch {message.epoch} after epoch {self.epoch}")
        self.epoch, self.position, self._last = message.epoch, message.position, None
        # What begins anew continues nothing, however it was to be rearranged.
        self._rows = _then(self._rows if message.position else None, message.rows)
        self._waiting = {key: received for key, received in self._waiting.items() if key[0] >= self.epoch}

    def add(self, received: ReceivedStep) -> bool:
        """Take a step, unless it is of the past; returns whether it is the last one again.

        Raises `Refused` if too many of the client's wait; those that are pushed are then ignored.
        """
        key, is_pushed = received.key, received.link is not None
        if key < (self.epoch, self.position):
            return key == self._last
        if key in self._waiting and (is_pushed or self._waiting[key].link is None):
            return False
        others = {other: each for other, each in self._waiting.items() if other != key}
        if not is_pushed and not _has_room(others, received):
            others = {other: each for other, each in others.items() if each.link is None}
        if _has_room(others, received):
            self._waiting = {**others, key: received}
        elif not is_pushed:
            raise rejected(f"more than {MAX_STEPS_AHEAD} steps, or {MAX_QUEUED_TOKENS} tokens, at once")
        return False

    def forget(self, link: str) -> None:
        """Whatever was pushed over this link and is not begun means nothing any more."""
        self._waiting = {key: received for key, received in self._waiting.items() if received.link != link}

    def again(self, received: ReceivedStep) -> None:
        """Let the last step be computed once more."""
        self.position = received.step.position
        self._waiting[received.key] = received

    @property
    def is_ready(self) -> bool:
        """Whether the next step is here."""
        return (self.epoch, self.position) in self._waiting

    def take(self) -> ReceivedStep:
        """The next step, which must be ready."""
        received = self._waiting.pop((self.epoch, self.position))
        rows, self._rows = self._rows, None
        self._last = received.key
        self.position += received.num_tokens
        return replace(received, rows=rows)

    def drop(self, taken: ReceivedStep) -> None:
        """The step that was taken last could not be computed: it is as if it had never come."""
        if self._last == taken.key:
            self.position, self._last = taken.step.position, None
        if self.position:
            self._rows = _then(taken.rows, self._rows)


def _has_room(view: dict[Key, ReceivedStep], received: ReceivedStep) -> bool:
    size = received.size + sum(each.size for each in view.values())
    return len(view) < MAX_STEPS_AHEAD and size <= MAX_QUEUED_TOKENS


def _then(first: Sequence[int] | None, second: Sequence[int] | None) -> tuple[int, ...] | None:
    """Two rearrangements as one. Raises `Refused` if the second is not of what the first left."""
    if first is None or second is None:
        rows = second if first is None else first
        return None if rows is None else tuple(rows)
    if max(second) >= len(first):
        raise rejected("rows of sequences that there are not")
    return tuple(first[row] for row in second)
