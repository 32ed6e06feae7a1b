"""The number that tells servers which version of a session's tokens a step belongs to."""

from __future__ import annotations

import logging
from enum import Enum

log = logging.getLogger(__name__)


class EpochReason(Enum):
    """Why steps that are still on their way have become wrong."""

    CROPPED = "tokens were forgotten"
    REARRANGED = "the batch was rearranged"
    SERVER_FAILED = "a server failed that may have pushed something wrong"
    PUSH_FAILED = "a server could not push to the next"
    DISTRUSTED = "a server may have computed something else than it should"
    OVERTAKEN = "a second server has taken the place of one that was late"
    STANDBY_AHEAD = "a standby repeats outputs that the lost server did not deliver"


class Epoch:
    """The present epoch of a session. Steps of former epochs that are still on their way mean nothing any more."""

    def __init__(self) -> None:
        self._number = 0

    @property
    def number(self) -> int:
        """The number of the present epoch."""
        return self._number

    def advance(self, reason: EpochReason) -> None:
        """Begin the next epoch. Every server is told of it before its next step."""
        self._number += 1
        log.debug("epoch %d: %s", self._number, reason.value)
