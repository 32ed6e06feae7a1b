"""What is said between those who run a network and its proxies."""

from __future__ import annotations

from enum import StrEnum

HOST = "127.0.0.1"


class ProxyCommand(StrEnum):
    """Whether a peer is connected to the others."""

    OPEN = "open"
    CUT = "cut"
    """Its connections are reset, and new ones are refused."""
    BLACK_HOLE = "black hole"
    """Nothing comes through, in either direction, and nobody says so."""
