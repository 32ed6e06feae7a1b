"""Reports why other peers do not store this server's announcement: one log line for each change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from shoal.net.records import CLOCK_SKEW

logger = logging.getLogger(__name__)


class StoreFailure(StrEnum):
    """Why an announcement is not stored. The values are log messages."""

    NO_ANSWER = "the peers that should store this server's announcement do not answer"
    CLOCKS_DIFFER = "other peers refuse this server's announcement because the clocks differ"
    REFUSED = "other peers do not store this server's announcement, and do not say why"


@dataclass
class StoreResponses:
    """The peers that refused a record, and those that did not answer, when they were asked to store it."""

    refused: set[Any] = field(default_factory=set)
    unanswered: set[Any] = field(default_factory=set)

    def watch(self, protocol: Any) -> None:
        """Note the responses to all store requests of this hivemind protocol from now on."""
        call_store: Callable[..., Any] = protocol.call_store

        async def watched(peer: Any, *arguments: Any, **options: Any) -> Any:
            responses = await call_store(peer, *arguments, **options)
            if responses is None:
                self.unanswered.add(peer)
            elif not all(responses):
                self.refused.add(peer)
            return responses

        protocol.call_store = watched

    def clear(self) -> None:
        """Forget all responses."""
        self.refused.clear()
        self.unanswered.clear()


def store_failure(*, is_stored: bool, num_refused: int, seconds_ahead: float | None) -> StoreFailure | None:
    """Why an announcement that `num_refused` peers refused is not stored; None if it is stored.

    `seconds_ahead` is the time by which the own clock is ahead of that of a refusing peer; None if it is unknown.
    """
    if is_stored:
        return None
    if not num_refused:
        return StoreFailure.NO_ANSWER
    if seconds_ahead is not None and abs(seconds_ahead) > CLOCK_SKEW:
        return StoreFailure.CLOCKS_DIFFER
    return StoreFailure.REFUSED


class StoreFailureLog:
    """Logs a failure when it begins and when it ends, not each time that it is repeated."""

    def __init__(self) -> None:
        self._current: StoreFailure | None = None

    def update(self, failure: StoreFailure | None, *, seconds_ahead: float | None = None) -> None:
        """The latest announcement had this failure; None is a success."""
        previous, self._current = self._current, failure
        if failure is previous:
            return
        if failure is None:
            logger.warning("other peers store this server's announcement again")
        elif failure is StoreFailure.CLOCKS_DIFFER and seconds_ahead is not None:
            direction = "ahead of" if seconds_ahead > 0 else "behind"
            logger.warning("%s: this machine's is %.0f s %s theirs", failure, abs(seconds_ahead), direction)
        else:
            logger.warning("%s; the server keeps announcing itself", failure)
