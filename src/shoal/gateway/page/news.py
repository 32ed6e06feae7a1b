"""What happens to a model's sessions, in words, for all pages that watch it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.events import Event, RouteChosen, ServerLost, StageReplaced, WaitEnded, Waiting
from shoal.peers import short

MOST_HELD = 100
"""The lines by which a page that reads slowly may lag behind."""


class News:
    """Passes on lines about a model. `tell` is an observer of the model; pages read in one event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: set[asyncio.Queue[str | None]] = set()

    def tell(self, event: Event) -> None:
        """Called by the client, on a thread of its own."""
        if self._loop is not None and not self._loop.is_closed() and (line := line_of(event)) is not None:
            self._loop.call_soon_threadsafe(self._put, line)

    @contextmanager
    def reading(self) -> Iterator[asyncio.Queue[str | None]]:
        """A queue of the lines that come from now on; `None` at the end."""
        self._loop = asyncio.get_running_loop()
        mine: asyncio.Queue[str | None] = asyncio.Queue()
        self._readers.add(mine)
        try:
            yield mine
        finally:
            self._readers.discard(mine)

    def end(self) -> None:
        """The gateway is about to end: all pages are told."""
        for reader in self._readers:
            reader.put_nowait(None)

    def _put(self, line: str) -> None:
        for reader in self._readers:
            if reader.qsize() < MOST_HELD:
                reader.put_nowait(line)


def line_of(event: Event) -> str | None:
    """What a person is told of an event; `None` for what only a log needs."""
    match event:
        case RouteChosen() | Waiting() | WaitEnded():
            return event.line
        case ServerLost():
            return event.reason  # it names the server
        case StageReplaced():
            return f"{short(event.peer)} was replaced by {', '.join(map(short, event.replacements))}"
    return None
