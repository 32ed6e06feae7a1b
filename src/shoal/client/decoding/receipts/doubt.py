"""What a session does not trust of what it was answered, because of receipts or of audits."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.client.decoding.stage import Stage
from shoal.errors import ServerLost
from shoal.spans import Span


@dataclass(frozen=True)
class Doubt:
    """The outputs for the blocks of `span` are not to be trusted from a `position` on.

    If they `can_be_mended`, they are computed again. A server that was found to be a `liar` is replaced before.
    """

    span: Span
    position: int
    reason: str
    can_be_mended: bool = True
    liar: str | None = None

    def apply_to(self, stage: Stage) -> None:
        """Let a stage of the session forget what is not to be trusted, and compute or be given it again."""
        if stage.hop.span.start >= self.span.end:
            stage.crop(self.position)
        elif stage.hop.span.end > self.span.start:
            stage.rewind_to(self.position)
        if stage.peer == self.liar:
            stage.fail(ServerLost(self.reason, peer=stage.peer))
