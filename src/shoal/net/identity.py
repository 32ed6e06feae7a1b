"""A peer's identity: an Ed25519 key pair. The peer id is derived from the public key.

libp2p writes a peer id as the base58 of a multihash. For Ed25519 that is the "identity" hash, so the id *contains* the
public key, and the id is enough to check a signature (libp2p specs, peer-ids). The same key authenticates the streams,
so both the records and the streams of a peer are provably its own.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.errors import UserError

SIGNATURE_BYTES = 64
# The beginning of protobuf messages with two fields: the key's type (1 is Ed25519), and its bytes (64: seed and public
# key, or 32: public key).
_PRIVATE_KEY = bytes.fromhex("08011240")
_PUBLIC_KEY = bytes.fromhex("08011220")
_MULTIHASH = bytes.fromhex("0024")  # the "identity" hash of 36 bytes
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Identity:
    """A private key, and the peer id `peer` that belongs to it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer = _peer_id(key.public_key().public_bytes_raw())

    @classmethod
    def temporary(cls) -> Identity:
        """A new identity, which is not stored."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in the file `path`. A missing file is created, readable by its owner only.

        Raises `UserError` for a file that holds no Ed25519 key, or cannot be read or created.
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
            hint = "name a file that does not exist: a new identity is created there"
            raise UserError(f"{path} is not an Ed25519 identity", hint=hint) from None
        except OSError as failure:
            hint = "choose a file that you may read and write"
            raise UserError(f"the identity {path} cannot be used: {failure.strerror}", hint=hint) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """The reverse of `to_bytes`. Raises `ValueError` for anything else."""
        prefix, seed, public = data[:4], data[4:36], data[36:]
        if prefix != _PRIVATE_KEY or len(data) != 68:
            raise ValueError("not a libp2p Ed25519 private key")
        key = Ed25519PrivateKey.from_private_bytes(seed)
        if key.public_key().public_bytes_raw() != public:
            raise ValueError("the public key does not belong to the private key")
        return cls(key)

    def to_bytes(self) -> bytes:
        """The private key in the form that libp2p's daemon reads: 68 bytes."""
        return _PRIVATE_KEY + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """The signature of `data`: `SIGNATURE_BYTES` bytes."""
        return self._key.sign(data)


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `peer` for `data`. False, without an error, for malformed ids and signatures."""
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
    """The key inside a peer id; None unless it is the id of an Ed25519 key in its canonical form."""
    raw = _base58_decode(peer) if len(peer) <= 64 else None
    if raw is None or len(raw) != 38 or raw[:6] != _MULTIHASH + _PUBLIC_KEY or _peer_id(raw[6:]) != peer:
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(raw[6:])
    except ValueError:
        return None


def peer_id_to_bytes(peer: str) -> bytes:
    """The binary form of a peer id. Raises `ValueError` for text that is not base58."""
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
