"""The version of the protocol, and what is said of peers that speak another one."""

from __future__ import annotations

PROTOCOL_VERSION = 8
"""Raised by a change of messages that older peers would misunderstand. Records say it, too."""
UPGRADE = "upgrade shoal where it is older: servers and clients of a swarm speak the same protocol"


def protocol_id(version: int) -> str:
    """The libp2p protocol id of a version: peers that speak another one cannot open a stream at all."""
    return f"/shoal/{version}"


def speaks_other(version: int) -> str:
    """What is said of a peer that speaks another version than this machine."""
    return f"speaks protocol {version} of shoal, and this machine speaks {PROTOCOL_VERSION}"


PROTOCOL = protocol_id(PROTOCOL_VERSION)
