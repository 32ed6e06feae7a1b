"""Lets only one process of a user on this machine use an identity."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import UserError
from shoal.net.identity import public_key
from shoal.net.libp2p.duplicate_identity import HINT

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def identity_lock(peer: str) -> Iterator[None]:
    """Hold the lock on the identity with this peer id, whichever file the identity came from.

    Raises `UserError` if another process holds it. If there is no place for the lock, the context runs without it:
    the server also looks in the directory for another process with its identity.
    """
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / peer, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as failure:
        logger.debug("the identity of %s cannot be locked on this machine: %s", peer, failure)
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


def is_used_here(peer: str) -> bool:
    """Whether a process of this user on this machine holds the lock on this identity. The peer id may be anything."""
    if public_key(peer) is None:
        return False
    try:
        lock = os.open(_folder() / peer, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"shoal-peers-{os.getuid()}"
