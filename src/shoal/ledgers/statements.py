"""Signed statements: which client acts for a server, and what a server has computed for a client.

    signature of   domain | JSON list of the fields, in the order below, without spaces

A delegation is of its server, the client and a time; an acknowledgement of its client, the server, the week and the
work. The peer ids contain the keys (`shoal.net.identity`), so a statement is checked without asking for anything.
"""

from __future__ import annotations

import json
from functools import lru_cache

from shoal.net.identity import Identity, verify
from shoal.protocol import Acknowledgement, Delegation

DELEGATION_SECONDS = 12 * 3600
"""How long a delegation is valid that a client makes."""
MAX_DELEGATION_SECONDS = 24 * 3600
"""The longest delegation that a server believes: a copied one is of no use later."""
_DELEGATION = b"shoal delegation 1\0"
_ACKNOWLEDGEMENT = b"shoal acknowledgement 1\0"


def delegate(server: Identity, client: str, *, until: int) -> Delegation:
    """The statement of a server that a client acts for it until a Unix time."""
    signature = server.sign(_DELEGATION + _list(server.peer, client, until))
    return Delegation(by=server.peer, until=until, signature=signature.hex())


def is_valid_delegation(delegation: Delegation, client: str, *, now: float) -> bool:
    """Whether the client acts for the server of a delegation at the Unix time `now`."""
    is_current = now < delegation.until <= now + MAX_DELEGATION_SECONDS
    return is_current and delegation.by != client and _is_signed(delegation, client)


@lru_cache(maxsize=4096)
def _is_signed(delegation: Delegation, client: str) -> bool:
    signed = _DELEGATION + _list(delegation.by, client, delegation.until)
    return verify(delegation.by, signed, bytes.fromhex(delegation.signature))


def acknowledge(client: Identity, server: str, *, period: int, work: int) -> Acknowledgement:
    """The statement of a client that a server has computed this much for it in a week.

    Raises `ValueError` for work out of bounds.
    """
    signature = client.sign(_ACKNOWLEDGEMENT + _list(client.peer, server, period, work))
    return Acknowledgement(client=client.peer, server=server, period=period, work=work, signature=signature.hex())


@lru_cache(maxsize=4096)  # clients present the same ones to open every session
def is_genuine(statement: Acknowledgement) -> bool:
    """Whether the client that an acknowledgement names has signed it."""
    signed = _list(statement.client, statement.server, statement.period, statement.work)
    return verify(statement.client, _ACKNOWLEDGEMENT + signed, bytes.fromhex(statement.signature))


def _list(*fields: str | int) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
