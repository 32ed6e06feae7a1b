"""How others took an announcement, and what is wrong if they do not keep it: told once, and once when it is over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from shoal.net.records import CLOCK_SKEW

logger = logging.getLogger(__name__)


class Fault(StrEnum):
    """Why an announcement is not kept; the values are for people."""

    SILENT = "the peers that should keep this server's announcement do not answer"
    CLOCK = "others refuse this server's announcement, because the clocks differ"
    REFUSED = "others do not keep this server's announcement, and do not say why"


@dataclass
class Answers:
    """Who answered what when they were asked to keep a record."""

    refused: set[Any] = field(default_factory=set)
    silent: set[Any] = field(default_factory=set)

    def listen(self, protocol: Any) -> None:
        """Note what is answered to this table's requests from now on."""
        call_store: Callable[..., Any] = protocol.call_store

        async def noted(peer: Any, *arguments: Any, **options: Any) -> Any:
            answers = await call_store(peer, *arguments, **options)
            if answers is None:
                self.silent.add(peer)
            elif not all(answers):
                self.refused.add(peer)
            return answers

        protocol.call_store = noted

    def clear(self) -> None:
        """Begin anew."""
        self.refused.clear()
        self.silent.clear()


def fault_of(*, is_kept: bool, num_refused: int, seconds_ahead: float | None) -> Fault | None:
    """What is wrong with an announcement that `num_refused` peers refused, if it is not kept.

    `seconds_ahead`: how far our clock is before that of one of these; `None` if it does not tell.
    """
    if is_kept:
        return None
    if not num_refused:
        return Fault.SILENT
    return Fault.CLOCK if seconds_ahead is not None and abs(seconds_ahead) > CLOCK_SKEW else Fault.REFUSED


class Reception:
    """Says when something goes wrong with the announcements, and when it is over: a line each time."""

    def __init__(self) -> None:
        self._fault: Fault | None = None

    def becomes(self, fault: Fault | None, *, seconds_ahead: float | None = None) -> None:
        """The latest announcement fared like this."""
        former, self._fault = self._fault, fault
        if fault is former:
            return
        if fault is None:
            logger.warning("others keep this server's announcement again")
        elif fault is Fault.CLOCK and seconds_ahead is not None:
            direction = "ahead of" if seconds_ahead > 0 else "behind"
            logger.warning("%s: this machine's is %.0f s %s theirs", fault, abs(seconds_ahead), direction)
        else:
            logger.warning("%s; it is announced again and again", fault)
