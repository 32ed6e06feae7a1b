"""The identities of this machine's own servers: a client that has one of their keys acts for that server."""

from __future__ import annotations

import logging
from pathlib import Path

from shoal.ledgers.ledger_place import SERVERS, LedgerPlace, identity_folder
from shoal.net.identity import Identity
from shoal.protocol import MAX_DELEGATIONS

log = logging.getLogger(__name__)

MAX_KEY_BYTES = 1024


def own_servers(place: LedgerPlace) -> tuple[Identity, ...]:
    """The identities of this machine's servers, as its place has them. Reads files.

    Of those that `shoal serve` keeps, the first ones count, by their names. A file that the user names and that is no
    identity is left out with a warning.
    """
    if place.identities is not None:
        named = [(path, _read(path)) for path in place.identities[:MAX_DELEGATIONS]]
        for path, identity in named:
            if identity is None:
                log.warning("%s is not the identity of a server: this client does not act for it", path)
        return tuple(identity for _, identity in named if identity is not None)
    kept = sorted(identity_folder(place.cache).glob(f"{SERVERS}-*"))
    found = (_read(path) for path in kept if path.suffix != ".lock")
    return tuple(identity for identity in found if identity is not None)[:MAX_DELEGATIONS]


def _read(path: Path) -> Identity | None:
    try:
        if path.stat().st_size > MAX_KEY_BYTES:
            return None
        return Identity.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        log.debug("%s is no identity: %s", path, error)
        return None
