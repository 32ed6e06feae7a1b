"""Connections without a request: how many there may be, and how long one may stay open."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 800
"""Below the 1,024 files that a process may often have open, of which connections to servers are some."""
HEAD_SECONDS = 20.0
"""Within twice this time, a connection gets the head of a request, or is closed."""


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP, which by itself waits for ever for the rest of a head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._check: asyncio.TimerHandle | None = None
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
        else:
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        """Whether there is no request, or not all of its head."""
        return self.cycle is None or self.cycle.response_complete

    def _look_later(self) -> None:
        self._check = self.loop.call_later(HEAD_SECONDS, self._look, self.cycle if self._is_idle else self)

    def _look(self, before: object) -> None:
        """Close the connection if it is as idle as it was `before`."""
        if self._is_idle and self.cycle is before:
            self.transport.close()
        else:
            self._look_later()
