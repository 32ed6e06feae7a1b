"""How far a server has come with its part of a session, as one frozen value.

    tokens   0 ············ num_computed ············ num_requested ·········
             └── answered ──┘└── pending: asked, not answered ──┘

Decoding, a long prefill and the replay after a failure are all the same work: `num_computed` catches up with the tokens
that the session has. Nothing here talks to a server. `Stage` does, and is the only one that replaces its progress.

The tokens themselves are in the stage's `History`, which a standby shares with the server whose place it may take.
A server to which another one pushes can be ahead of that history: its step, and even its answer, may come before the
client knows the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from shoal.client.decoding.pending_step import PendingStep


class StageStatus(Enum):
    """How a stage stands with its server. One at a time."""

    CLOSED = auto()
    """There is no connection. The server knows nothing of the session."""
    OPENING = auto()
    """There is a connection, and the server has not opened the session yet."""
    OPEN = auto()
    """The server can be asked."""
    MISLED = auto()
    """The server can be asked. Its oldest answer is wrong, but another server pushed that step, perhaps wrongly."""
    FAILED = auto()
    """The server is of no more use. `error` says why, and the session has not seen it."""
    REPORTED = auto()
    """The same, and the session has seen the error."""

    @property
    def is_open(self) -> bool:
        """Whether the server can be asked."""
        return self in (StageStatus.OPEN, StageStatus.MISLED)


@dataclass(frozen=True)
class StageProgress:
    """What a server was asked, what it has answered, and what it has still to be told.

    The value of a server that knows nothing of the session is `StageProgress()`. Every method that is named by a
    participle returns the value after that event. It always holds that `0 <= num_computed <= num_requested`, and that
    the `pending` steps cover the tokens between the two without a gap, the oldest first.
    """

    num_computed: int = 0
    pending: tuple[PendingStep, ...] = ()
    epoch: int | None = None
    """The epoch that the server was told last; None before it was told any."""
    rows: tuple[int, ...] | None = None
    """A rearrangement of the batch that the server was not told yet: sequence i continues the one that was `rows[i]`.

    None if there is none, or if the server has computed nothing that could be rearranged.
    """
    num_cached: int = 0
    """How many tokens the server had in its cache when it opened the session."""
    is_rewound: bool = False
    """Whether the server was told to take computed tokens along into its present epoch. Some models cannot."""
    num_idle_pongs: int = 0
    """How often in a row the server has said that it is idle, although it was asked."""

    @property
    def num_requested(self) -> int:
        """How many tokens the server was asked to compute, those that it has computed included."""
        return self.pending[-1].end if self.pending else self.num_computed

    def accepts(self, epoch: int) -> bool:
        """Whether the server can be asked for a step of this epoch: no step of another one is on its way."""
        return self.epoch == epoch or not self.pending

    def awaits(self, epoch: int, position: int) -> bool:
        """Whether the step of this epoch and position is pending."""
        return any(step.key == (epoch, position) for step in self.pending)

    @property
    def oldest(self) -> PendingStep | None:
        """The step that the server answers next; None if it was asked for nothing."""
        return self.pending[0] if self.pending else None

    # -- what the server is told and asked ----------------------------------------------------------------------------

    def entered_epoch(self, epoch: int) -> StageProgress:
        """The server was told the epoch, and with it the rearrangement of rows."""
        return replace(self, epoch=epoch, rows=None, is_rewound=self.num_computed > 0)

    def requested(self, step: PendingStep) -> StageProgress:
        """The server was asked for the step that follows what it was asked before."""
        assert step.position == self.num_requested < step.end
        return replace(self, pending=(*self.pending, step), num_idle_pongs=0)

    # -- what the server says -----------------------------------------------------------------------------------------

    def opened_with(self, num_tokens: int) -> StageProgress:
        """The server opened the session, and had these tokens in its cache already."""
        assert not self.pending
        return replace(self, num_computed=num_tokens, num_cached=num_tokens)

    def answered(self) -> StageProgress:
        """The server answered the oldest pending step."""
        step, *later = self.pending
        return replace(self, num_computed=step.end, pending=tuple(later), num_idle_pongs=0)

    def ponged(self, *, idle: bool) -> StageProgress:
        """The server said whether it is idle while an answer is awaited."""
        return replace(self, num_idle_pongs=self.num_idle_pongs + 1 if idle else 0)

    def disconnected(self) -> StageProgress:
        """The connection is gone, and the server's state with it.

        `is_rewound` stays until the next `entered_epoch`, for the error that ended the connection may be about that.
        """
        return StageProgress(is_rewound=self.is_rewound)

    # -- what the session takes back ----------------------------------------------------------------------------------

    def unrequested_from(self, position: int) -> StageProgress:
        """The steps that reach beyond `position` did not get to the server: they have to be asked again."""
        return replace(self, pending=tuple(step for step in self.pending if step.end <= position))

    def rewound_to(self, position: int) -> StageProgress:
        """What the server computed from `position` on no longer counts, and neither does what is pending."""
        num_computed = min(self.num_computed, position)
        return replace(self, num_computed=num_computed, pending=(), rows=self.rows if num_computed else None)

    def rearranged(self, rows: Sequence[int]) -> StageProgress:
        """Sequence i continues the one that was `rows[i]`. What is pending was asked for the old arrangement."""
        composed = tuple(rows) if self.rows is None else tuple(self.rows[row] for row in rows)
        return replace(self, pending=(), rows=composed if self.num_computed else None)


def awaited_steps(ring: Sequence[StageProgress]) -> list[PendingStep | None]:
    """For each server of a ring, in order, the step that it owes: it was asked, and the server before has its inputs.

    None for one that owes nothing.
    """
    owed: list[PendingStep | None] = []
    for index, progress in enumerate(ring):
        step = progress.oldest
        has_inputs = step is not None and (not index or ring[index - 1].num_computed >= step.end)
        owed.append(step if has_inputs else None)
    return owed
