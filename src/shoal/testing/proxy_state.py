"""What the proxy process and the code that controls it have in common."""

from __future__ import annotations

from enum import StrEnum

HOST = "127.0.0.1"
"""The address of all peers and proxies: a shaped swarm runs on one machine."""


class ProxyState(StrEnum):
    """Whether a proxy connects its peer to the others."""

    OPEN = "open"
    CUT = "cut"
    """The proxy resets the peer's connections and refuses new ones."""
    BLACK_HOLE = "black hole"
    """The proxy forwards nothing in either direction and reports no error."""
