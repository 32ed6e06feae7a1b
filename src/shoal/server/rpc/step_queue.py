"""Which of a session's steps is computed next, whether its client or a server sent it, in any order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.protocol import MAX_STEP_TOKENS, MAX_STEPS_AHEAD, Rewind, Step
from shoal.server.refusals import rejected
from shoal.server.step_inputs import StepInputs

MAX_QUEUED_TOKENS = 8 * MAX_STEP_TOKENS
"""The tokens, of all sequences, of the steps of one session that wait: their inputs stay in memory meanwhile."""

Key = tuple[int, int]  # epoch, position


@dataclass(frozen=True)
class ReceivedStep:
    """A step and its validated inputs. `rows` says which old sequence each sequence continues, if any.

    `link` is the link over which a server pushed it; None if the client sent it itself.
    """

    step: Step
    inputs: StepInputs
    rows: tuple[int, ...] | None = None
    link: str | None = None

    @property
    def key(self) -> Key:
        """The epoch and position that name it."""
        return self.step.epoch, self.step.position

    @property
    def num_tokens(self) -> int:
        """The new tokens of each sequence."""
        return self.inputs.num_tokens

    @property
    def size(self) -> int:
        """The new tokens of all sequences."""
        return self.inputs.size


class StepQueue:
    """Steps come from the client and from the upstream server, twice or too early; each is begun once, in its turn.

    The next step is that of `epoch` and `position`. Only the client, by a `Rewind`, makes another one the next. The
    client's own steps come before pushed ones: any peer may push, and must not keep the client's steps out.
    """

    def __init__(self, epoch: int, position: int) -> None:
        self.epoch = epoch
        self.position = position
        self._rows: tuple[int, ...] | None = None
        self._waiting: dict[Key, ReceivedStep] = {}
        self._last: Key | None = None

    @property
    def waiting(self) -> tuple[ReceivedStep, ...]:
        """The steps that are here and not taken."""
        return tuple(self._waiting.values())

    def rewind(self, message: Rewind) -> None:
        """Begin another epoch. Raises `Refused` if it is not later than all before."""
        if message.epoch <= self.epoch:
            raise rejected(f"epoch {message.epoch} after epoch {self.epoch}")
        self.epoch, self.position, self._last = message.epoch, message.position, None
        # A session that begins anew continues no sequence: earlier rearrangements mean nothing.
        self._rows = _then(self._rows if message.position else None, message.rows)
        self._waiting = {key: received for key, received in self._waiting.items() if key[0] >= self.epoch}

    def add(self, received: ReceivedStep) -> bool:
        """Hold a step, unless it is of the past. Returns whether it is the last one again.

        Raises `Refused` if too many of the client's steps wait. Pushed steps are ignored in that case.
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
        """Drop the steps that were pushed over this link and are not taken."""
        self._waiting = {key: received for key, received in self._waiting.items() if received.link != link}

    def again(self, received: ReceivedStep) -> None:
        """Make the last step the next one, to be computed once more."""
        self.position = received.step.position
        self._waiting[received.key] = received

    @property
    def following(self) -> ReceivedStep | None:
        """The next step; None if it is not here."""
        return self._waiting.get((self.epoch, self.position))

    @property
    def is_ready(self) -> bool:
        """Whether the next step is here."""
        return self.following is not None

    def take(self) -> ReceivedStep:
        """The next step, which must be ready."""
        received = self._waiting.pop((self.epoch, self.position))
        rows, self._rows = self._rows, None
        self._last = received.key
        self.position += received.num_tokens
        return replace(received, rows=rows)

    def drop(self, taken: ReceivedStep) -> None:
        """Undo taking the last step, which could not be computed: it is as if it had never come."""
        if self._last == taken.key:
            self.position, self._last = taken.step.position, None
        if self.position:
            self._rows = _then(taken.rows, self._rows)


def _has_room(waiting: dict[Key, ReceivedStep], received: ReceivedStep) -> bool:
    size = received.size + sum(each.size for each in waiting.values())
    return len(waiting) < MAX_STEPS_AHEAD and size <= MAX_QUEUED_TOKENS


def _then(first: Sequence[int] | None, second: Sequence[int] | None) -> tuple[int, ...] | None:
    """Two rearrangements as one. Raises `Refused` if the second names sequences that the first did not leave."""
    if first is None or second is None:
        rows = second if first is None else first
        return None if rows is None else tuple(rows)
    if max(second) >= len(first):
        raise rejected("rows of sequences that there are not")
    return tuple(first[row] for row in second)
