"""Why the libp2p daemon could not do something, in our own words: its own are for the log of everything."""

from __future__ import annotations

import logging

logger = logging.getLogger("shoal.net.libp2p.daemon")

REASONS = {
    "peer id mismatch": "another peer has its address now",
    "protocols not supported": "it does not speak our version of the protocol",
    "no_reservation": "its relay is not connected to it",
    "connection refused": "nothing listens there",
    "no route to host": "there is no route to it",
    "network is unreachable": "there is no route to it",
    "no such host": "its host name is not known",
    "i/o timeout": "it does not answer",
    "deadline exceeded": "it does not answer",
    "resource limit exceeded": "it has too many connections, or this machine does",
    "dial to self": "it is this peer itself",
    "connection reset": "the connection was cut",
    "stream reset": "the connection was cut",
    "failed to find": "its address is not known",
    "not found": "its address is not known",
    "no addresses": "its address is not known",
    "dial backoff": "tried in vain a moment ago",
}
"""By a part of what the daemon says, which may tell of several attempts: what explains most comes first."""

OTHER = "the connection failed"


def in_our_words(said: str) -> str:
    """The reason that the daemon gives. What it says itself goes to the log at DEBUG."""
    logger.debug("the libp2p daemon says: %s", said)
    lowered = said.lower()
    return next((reason for sign, reason in REASONS.items() if sign in lowered), OTHER)
