"""What happens to a model's sessions, for all pages that watch it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.events import Event, RouteChosen, ServerLost, StageReplaced, TextDoubtful, WaitEnded, WaitingForBlocks

MOST_HELD = 100
"""The events by which a page that reads slowly may lag behind."""


class News:
    """Passes on what a person wants to know of a model. `tell` is an observer of it; pages read in one event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: set[asyncio.Queue[Event | None]] = set()

    def tell(self, event: Event) -> None:
        """Called by the client, on a thread of its own."""
        match event:
            case RouteChosen() | WaitingForBlocks() | WaitEnded() | ServerLost() | StageReplaced() | TextDoubtful():
                if self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._put, event)

    @contextmanager
    def reading(self) -> Iterator[asyncio.Queue[Event | None]]:
        """A queue of the events that come from now on; `None` at the end."""
        self._loop = asyncio.get_running_loop()
        mine: asyncio.Queue[Event | None] = asyncio.Queue()
        self._readers.add(mine)
        try:
            yield mine
        finally:
            self._readers.discard(mine)

    def end(self) -> None:
        """The gateway is about to end: all pages are told."""
        for reader in self._readers:
            reader.put_nowait(None)

    def _put(self, event: Event) -> None:
        for reader in self._readers:
            if reader.qsize() < MOST_HELD:
                reader.put_nowait(event)
