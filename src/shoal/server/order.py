"""Which of a session's steps is computed next, whoever sends them and in whatever order they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.net.codec import Tensors
from shoal.protocol import MAX_STEPS_AHEAD, Rewind, Step
from shoal.server.refusal import rejected

Key = tuple[int, int]  # epoch, position


@dataclass(frozen=True)
class Arrived:
    """A step and its tensors, and how the batch is rearranged before it."""

    step: Step
    tensors: Tensors
    rows: tuple[int, ...] | None = None

    @property
    def key(self) -> Key:
        return self.step.epoch, self.step.position


class Order:
    """Steps come from the client and from the server before, twice or too early; each is begun once, in its turn.

    The next step is that of `epoch` and `position`. Only the client, by a `Rewind`, makes it another one than that
    which follows the last.
    """

    def __init__(self, epoch: int, position: int) -> None:
        self.epoch = epoch
        self.position = position
        self._rows: tuple[int, ...] | None = None
        self._waiting: dict[Key, Arrived] = {}
        self._last: Key | None = None

    def rewind(self, message: Rewind) -> None:
        """Raises `Refused` for an epoch that is not later than all before."""
        if message.epoch <= self.epoch:
            raise rejected(f"epoch {message.epoch} after epoch {self.epoch}")
        self.epoch, self.position, self._last = message.epoch, message.position, None
        self._rows = message.rows if self._rows is None else _then(self._rows, message.rows)
        self._waiting = {key: arrived for key, arrived in self._waiting.items() if key[0] >= self.epoch}

    def add(self, step: Step, tensors: Tensors) -> bool:
        """Take a step, unless it is of the past; returns whether it is the last one again.

        Raises `Refused` if too many wait.
        """
        arrived = Arrived(step, tensors)
        if arrived.key < (self.epoch, self.position):
            return arrived.key == self._last
        if len(self._waiting) >= MAX_STEPS_AHEAD and arrived.key not in self._waiting:
            raise rejected(f"more than {MAX_STEPS_AHEAD} steps at once")
        self._waiting.setdefault(arrived.key, arrived)
        return False

    def again(self, step: Step, tensors: Tensors) -> None:
        """Let the last step be computed once more."""
        self.position = step.position
        self._waiting[self.epoch, step.position] = Arrived(step, tensors)

    @property
    def is_ready(self) -> bool:
        """Whether the next step is here."""
        return (self.epoch, self.position) in self._waiting

    def take(self) -> Arrived:
        """The next step, which must be ready."""
        arrived = self._waiting.pop((self.epoch, self.position))
        rows, self._rows = self._rows, None
        self._last = arrived.key
        hidden = arrived.tensors.get("hidden")
        self.position += 0 if hidden is None or hidden.dim() < 2 else hidden.shape[1]
        return Arrived(arrived.step, arrived.tensors, rows)

    def untake(self, arrived: Arrived) -> None:
        """It was none: this step is still to come."""
        self.position, self._rows, self._last = arrived.step.position, arrived.rows, None


def _then(first: Sequence[int], second: Sequence[int] | None) -> tuple[int, ...]:
    """Two rearrangements as one. Raises `Refused` if the second is not of what the first left."""
    if second is None:
        return tuple(first)
    if max(second) >= len(first):
        raise rejected("rows of sequences that there are not")
    return tuple(first[row] for row in second)
