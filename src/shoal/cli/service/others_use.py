"""How much of the processor programs use that are not this one: for servers that compute only on an idle machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil

WORK = ("user", "nice", "system", "irq", "softirq")
"""The kinds of processor time that are work, of those that psutil reports. The time of guests is in the first two."""


class OthersUse:
    """Counts the processor time that is used by none of this process and its descendants."""

    def __init__(self) -> None:
        self._total = _total()
        self._own = dict(_own())
        self._others = 0.0

    def look(self) -> float:
        """The seconds of a core that others have used since this was made. They never become less.

        What a process of ours used in its last moments, since it was looked at before, counts for the others.
        """
        total, own = _total(), dict(_own())
        ours = sum(used - self._own.get(process, 0.0) for process, used in own.items())
        self._others += max(0.0, total - self._total - ours)
        self._total, self._own = total, own
        return self._others


def _total() -> float:
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in WORK))


def _own() -> Iterator[tuple[psutil.Process, float]]:
    """Our processes, with what each has used so far. They are equal if pid and start are."""
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            yield process, times.user + times.system
