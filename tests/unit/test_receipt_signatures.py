"""A receipt is good for one session of one client on one server, and for nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from pydantic import ValidationError

from shoal.net.identity import Identity, verify
from shoal.net.signing.receipt_signatures import is_signed, signed_receipt
from shoal.net.transport import Transport
from shoal.protocol import ProtocolViolation, Receipt, dump, parse

SESSION, OTHER_SESSION = "0" * 32, "1" * 32
FIELDS: dict[str, Any] = {"epoch": 3, "first": 16, "end": 32, "inputs": "a" * 64, "answered": "b" * 64, "pushed": None}


@dataclass
class Peer:
    """A peer of the real network, as far as signatures go."""

    identity: Identity = field(default_factory=Identity.temporary)

    @property
    def peer(self) -> str:
        return self.identity.peer

    def sign(self, data: bytes) -> bytes:
        return self.identity.sign(data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        return verify(peer, data, signature)


SERVER, CLIENT, OTHER = (cast(Transport, Peer()) for _ in range(3))


def receipt(signer: Transport = SERVER) -> Receipt:
    return signed_receipt(signer, session=SESSION, client=CLIENT.peer, **FIELDS)


def test_the_client_knows_the_signature_of_the_server_after_the_receipt_has_travelled():
    received = parse(dump(receipt()))
    assert isinstance(received, Receipt)
    assert is_signed(CLIENT, received, session=SESSION, server=SERVER.peer)


def test_no_other_session_client_or_server_can_use_it():
    signed = receipt()
    assert not is_signed(CLIENT, signed, session=OTHER_SESSION, server=SERVER.peer)
    assert not is_signed(OTHER, signed, session=SESSION, server=SERVER.peer)
    assert not is_signed(CLIENT, signed, session=SESSION, server=OTHER.peer)
    assert not is_signed(CLIENT, receipt(OTHER), session=SESSION, server=SERVER.peer)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 4},
        {"first": 15},
        {"end": 33},
        {"inputs": "c" * 64},
        {"answered": "c" * 64},
        {"answered": None},
        {"pushed": "b" * 64},
        {"answered": None, "pushed": "b" * 64},
        {"signature": "0" * 128},
    ],
)
def test_every_field_is_signed(change: dict[str, Any]):
    changed = receipt().model_copy(update=change)
    assert not is_signed(CLIENT, changed, session=SESSION, server=SERVER.peer)


@pytest.mark.parametrize(
    "change",
    [
        {"first": 32},
        {"end": 1 << 40},
        {"inputs": "a" * 63},
        {"inputs": "A" * 64},
        {"answered": "b" * 65},
        {"signature": "0" * 127},
        {"signature": None},
        {"more": 1},
        {"tensors": [{"name": "hidden", "dtype": "float32", "shape": [1]}]},
    ],
)
def test_a_malformed_receipt_is_refused(change: dict[str, Any]):
    header = json.dumps({**json.loads(dump(receipt())), **change}).encode()
    with pytest.raises(ProtocolViolation):
        parse(header)
    with pytest.raises(ValidationError):
        Receipt(**{**receipt().model_dump(), **change})
