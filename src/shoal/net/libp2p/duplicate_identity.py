"""Detects a second process with this peer's identity. Other peers see only the one that announced itself last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from shoal.net.libp2p.daemon import DaemonFailed
from shoal.net.libp2p.strangers import stranger
from shoal.net.records import CLOCK_SKEW, Announcement
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ServerState

logger = logging.getLogger(__name__)

DIAL_SECONDS = 8.0
"""How long another process with the same identity may take to answer."""
HINT = "an identity file was copied: name another one (--identity), or leave it out"


async def answers_elsewhere(peer: str, addresses: Sequence[str]) -> bool:
    """Whether a process with the identity `peer`, which is this peer's own, answers at one of these addresses.

    A temporary daemon with another identity dials it, because libp2p refuses to dial the own peer id.
    """
    try:
        async with stranger() as daemon, asyncio.timeout(DIAL_SECONDS):
            await daemon.connect(peer, addresses)
    except (DaemonFailed, TimeoutError) as failure:
        logger.debug("%s does not answer elsewhere: %s", peer, failure)
        return False
    return True


class DuplicateIdentityWatch:
    """Warns once when another process announces itself with this peer's identity."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._started_at = 0.0
        self._own_addresses: set[str] = set()
        self._has_warned = False

    def add_own(self, addresses: Sequence[str], *, now: float) -> None:
        """Note that this process announces these addresses, at the Unix time `now`."""
        self._started_at = self._started_at or now
        self._own_addresses.update(addresses)

    def record(self, announcement: Announcement) -> None:
        """Examine an announcement from the DHT.

        One that is left over from an earlier process that crashed is no other server. One of a server that has come up
        since this process started is not left over, and neither is one that expires later than `MAX_LIFETIME` after
        that start. So of two servers the one that started first says so at once, and the other within that time.
        """
        if (
            self._has_warned
            or announcement.peer != self._peer
            or announcement.state is ServerState.LEAVING
            or not self._was_made_since(announcement)
            or not self._own_addresses
            or not self._own_addresses.isdisjoint(announcement.addresses)
        ):
            return
        self._has_warned = True
        where = ", ".join(announcement.addresses) or "an unknown address"
        logger.warning(
            "another server has this one's identity, at %s: other peers see only one of the two; %s", where, HINT
        )

    def _was_made_since(self, announcement: Announcement) -> bool:
        """Whether the announcement was made after this process started."""
        has_come_later = (announcement.up_since or 0.0) > self._started_at + CLOCK_SKEW
        return has_come_later or announcement.expires > self._started_at + MAX_LIFETIME
