"""Who a peer is: an Ed25519 key, whose public half is its peer id.

libp2p writes a peer id as the base58 of a multihash; for Ed25519 that is the "identity" hash, so the id *contains* the
public key and a signature can be checked by anybody who knows the id (libp2p specs, peer-ids). The same key encrypts
the streams, so what a peer signs and what it sends are provably its own.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.errors import UserError

SIGNATURE_BYTES = 64
# Protobuf messages with two fields, the key's type (1 is Ed25519) and its bytes: 64 (seed, public key) or 32.
_PRIVATE_KEY = bytes.fromhex("08011240")
_PUBLIC_KEY = bytes.fromhex("08011220")
_MULTIHASH = bytes.fromhex("0024")  # the "identity" hash of 36 bytes
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Identity:
    """A private key: signs, and proves to be `peer`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer = _peer_id(key.public_key().public_bytes_raw())

    @classmethod
    def temporary(cls) -> Identity:
        """A new identity that nobody keeps."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def at(cls, path: Path) -> Identity:
        """The identity kept at `path`; created, readable by its owner only, if there is none.

        Raises `UserError` for a file that is no Ed25519 key.
        """
        try:
            try:
                return cls.from_bytes(path.read_bytes())
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                identity = cls.temporary()
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(identity.to_bytes())
                return identity
        except ValueError:
            hint = "name a file that does not exist, and a new identity is created there"
            raise UserError(f"{path} is not an Ed25519 identity", hint=hint) from None
        except OSError as failure:
            hint = "choose a place that you may read and write"
            raise UserError(f"the identity {path} cannot be used: {failure.strerror}", hint=hint) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """The reverse of `to_bytes`. Raises `ValueError`."""
        prefix, seed, public = data[:4], data[4:36], data[36:]
        if prefix != _PRIVATE_KEY or len(data) != 68:
            raise ValueError("not a libp2p Ed25519 private key")
        key = Ed25519PrivateKey.from_private_bytes(seed)
        if key.public_key().public_bytes_raw() != public:
            raise ValueError("the halves of the key do not belong together")
        return cls(key)

    def to_bytes(self) -> bytes:
        """The key as libp2p's daemon reads it."""
        return _PRIVATE_KEY + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """64 bytes that only this identity can make for this data."""
        return self._key.sign(data)


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    """Whether `peer` signed exactly this. False, never an error, for ids and signatures that are none."""
    key = public_key(peer)
    if key is None:
        return False
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=4096)
def public_key(peer: str) -> Ed25519PublicKey | None:
    """The key inside a peer id; None if it is not the id of an Ed25519 key, in its one way of writing."""
    raw = _base58_decode(peer) if len(peer) <= 64 else None
    if raw is None or len(raw) != 38 or raw[:6] != _MULTIHASH + _PUBLIC_KEY or _peer_id(raw[6:]) != peer:
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(raw[6:])
    except ValueError:
        return None


def peer_id_to_bytes(peer: str) -> bytes:
    """A peer id as it stands in messages. Raises `ValueError` for what is none."""
    raw = _base58_decode(peer)
    if raw is None:
        raise ValueError(f"not a peer id: {peer[:64]!r}")
    return raw


def peer_id_of(raw: bytes) -> str:
    """The reverse of `peer_id_to_bytes`."""
    number = int.from_bytes(raw, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return "1" * zeros + digits


def _peer_id(public: bytes) -> str:
    return peer_id_of(_MULTIHASH + _PUBLIC_KEY + public)


def _base58_decode(text: str) -> bytes | None:
    number = 0
    for character in text:
        digit = _BASE58.find(character)
        if digit < 0:
            return None
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
