"""Translates the error messages of the libp2p daemon into plain English."""

from __future__ import annotations

import logging

logger = logging.getLogger("shoal.net.libp2p.daemon")

NO_PROTOCOL = "protocols not supported"

REASONS = {
    "peer id mismatch": "another peer has its address now",
    NO_PROTOCOL: "it takes no streams of shoal",
    "no_reservation": "its relay is not connected to it",
    "connection refused": "nothing listens there",
    "no route to host": "there is no route to it",
    "network is unreachable": "there is no route to it",
    "no such host": "its host name is not known",
    "i/o timeout": "it does not answer",
    "deadline exceeded": "it does not answer",
    "resource limit exceeded": "it has too many connections, or this machine has",
    "dial to self": "it is this peer itself",
    "connection reset": "the connection was cut",
    "stream reset": "the connection was cut",
    "failed to find": "its address is not known",
    "not found": "its address is not known",
    "no addresses": "its address is not known",
    "dial backoff": "dialling it failed a moment ago",
}
"""By a part of the daemon's message. A message may list several attempts, so the most informative parts come first."""

OTHER = "the connection failed"
"""For a message without any of these parts."""


def plain_reason(message: str) -> str:
    """The reason in the daemon's error message, in plain English. The message itself goes to the log at DEBUG."""
    logger.debug("the libp2p daemon reports: %s", message)
    lowered = message.lower()
    return next((reason for part, reason in REASONS.items() if part in lowered), OTHER)
