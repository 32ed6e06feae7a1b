"""What a session looks like from outside: frozen, for tests and for everything that shows a session."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.client.decoding.progress import StageProgress, StageStatus
from shoal.client.decoding.stage import Stage
from shoal.policy.routing.route import Hop


@dataclass(frozen=True)
class StageState:
    """One server of a session: its hop, how the session stands with it, and how far it has come."""

    hop: Hop
    status: StageStatus
    progress: StageProgress
    num_unsettled: int
    """Answers that have come and were not looked at."""
    signs: bool
    """Whether receipts are expected of it: they were asked for, and it has not been silent for long."""

    @property
    def is_open(self) -> bool:
        """Whether the server can be asked."""
        return self.status.is_open


@dataclass(frozen=True)
class SessionState:
    """The servers that a session runs on, in order, and the servers that are kept warm to replace one of them."""

    epoch: int
    stages: tuple[StageState, ...]
    standbys: tuple[StageState, ...]

    @property
    def is_open(self) -> bool:
        """Whether there is a server for every block, and every server can be asked."""
        return bool(self.stages) and all(stage.is_open for stage in self.stages)


def states_of(stages: Iterable[Stage]) -> tuple[StageState, ...]:
    """What these stages look like now."""
    return tuple(
        StageState(stage.hop, stage.status, stage.progress, stage.num_unsettled, stage.receipts.signs)
        for stage in stages
    )
