"""Two processes with one identity: others would take them for one peer, and see only the one that spoke last."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.errors import UserError
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon, DaemonConfig, DaemonFailed
from shoal.net.records import Announcement
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ServerState

logger = logging.getLogger(__name__)

DIAL_SECONDS = 8.0
HINT = "an identity file was copied: name another one (--identity), or leave it out"


@contextlib.contextmanager
def only_here(peer: str) -> Iterator[None]:
    """Be the only process of this user on this machine that has this identity, wherever its file is.

    Raises `UserError` if there is one already.
    """
    folder = Path(tempfile.gettempdir()) / f"shoal-peers-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / peer, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as failure:  # the swarm is asked too
        logger.debug("whether %s runs here already is not known: %s", peer, failure)
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process of this machine is the peer {peer} already", hint=HINT) from None
        yield
    finally:
        os.close(lock)


async def answers_elsewhere(peer: str, addresses: Sequence[str]) -> bool:
    """Whether a process with this identity, which is our own, answers at one of these addresses.

    It is dialled with another identity, for no peer dials itself.
    """
    try:
        daemon = await Daemon.start(Identity.temporary(), DaemonConfig())
    except DaemonFailed as failure:
        logger.debug("%s cannot be dialled: %s", peer, failure)
        return False
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            await daemon.connect(peer, addresses)
    except (DaemonFailed, TimeoutError):
        return False
    else:
        return True
    finally:
        await daemon.stop()


class Twins:
    """Notices that another process announces itself under our identity, and says so once."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._started_at = 0.0
        self._places: set[str] = set()
        self._noticed = False

    def announces(self, addresses: Sequence[str], *, now: float) -> None:
        """We say that we are here; all that we ever said is ours."""
        self._started_at = self._started_at or now
        self._places.update(addresses)

    def record(self, announcement: Announcement) -> None:
        """Somebody keeps this. What ends so late was not said before we started, by a process that crashed."""
        if (
            self._noticed
            or announcement.peer != self._peer
            or announcement.state is ServerState.LEAVING
            or announcement.expires <= self._started_at + MAX_LIFETIME
            or not self._places
            or not self._places.isdisjoint(announcement.addresses)
        ):
            return
        self._noticed = True
        places = ", ".join(announcement.addresses) or "an unknown place"
        logger.warning("another server has this one's identity, at %s: others see only one of them; %s", places, HINT)
